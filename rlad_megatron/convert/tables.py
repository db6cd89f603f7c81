"""What `rlad convert` prints: the dry run, tables of tensors, progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlad_megatron.convert.targets import HfTarget, MegatronTarget, Target
from rlad_megatron.models.load import HfCheckpoint
from rlad_megatron.models.torch_dist import MODEL_PREFIXES, find_iteration, is_megatron, read_common, read_metadata

SMALL_BYTES = 150 * 10**6  # next to the largest parameter: small ones, the layout, pages of libraries


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes and rate; yields the function that advances it."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def print_dry_run(console: Console, target: Target) -> None:
    """What a conversion would write and the memory it needs."""
    conversion = target.conversion
    table = Table(show_header=False)
    table.add_row("from", f"{conversion.source} ({'Megatron' if is_megatron(conversion.source) else 'Hugging Face'})")
    table.add_row("to", f"{conversion.target} ({'Megatron' if conversion.layout else 'Hugging Face'})")
    table.add_row("model", f"{conversion.spec.model_type}, {conversion.spec.num_layers} layers")
    if isinstance(target, MegatronTarget):
        table.add_row("layout", str(conversion.layout))
        table.add_row("iteration", conversion.iteration_name)
        table.add_row("chunks", str(sum(len(file.chunks) for file in target.files)))
        table.add_row("files", str(sum(bool(file.plan.items) for file in target.files)))
    elif isinstance(target, HfTarget):
        table.add_row("tensors", str(len(target.tensors)))
        table.add_row("files", str(target.files.count))
    table.add_row("dtype", conversion.dtype)
    table.add_row("bytes written", f"{target.total:,}")
    table.add_row("processes", str(conversion.processes))
    table.add_row("largest parameter", f"{target.largest / 1e6:,.1f} MB")
    memory = (2 * target.largest + SMALL_BYTES) / 1e6
    table.add_row("memory of each process", f"at most {memory:,.0f} MB over the interpreter's own")
    console.print(table)


def print_tensors(console: Console, folder: str | Path) -> None:
    """Tables of names, shapes, dtypes, layout and sizes of a checkpoint in either format."""
    if is_megatron(folder):
        _print_megatron(console, Path(folder))
    else:
        _print_hf(console, Path(folder))


def _print_hf(console: Console, folder: Path) -> None:
    checkpoint = HfCheckpoint(folder)
    table = _table("tensor", "shape", "dtype", "file", "MB")
    total = numel = 0
    for name, file in sorted(checkpoint.files.items()):
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        size = math.prod(shape) * dtype.itemsize
        total, numel = total + size, numel + math.prod(shape)
        table.add_row(name, _shape(shape), _dtype(dtype), file, f"{size / 1e6:,.3f}")
    _print_wide(console, table)
    files = len(set(checkpoint.files.values()))
    console.print(f"{folder}: Hugging Face, {numel:,} parameters, {decimal(total)}, files: {files}", soft_wrap=True)


def _print_megatron(console: Console, folder: Path) -> None:
    path, iteration = find_iteration(folder)
    metadata = read_metadata(path)
    table = _table("tensor", "shape", "dtype", "chunks", "of shape", "MB")
    total = numel = other = 0
    for key, value in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(value, TensorStorageMetadata):
            continue
        if not key.startswith(MODEL_PREFIXES):
            other += 1
            continue
        size = math.prod(value.size) * value.properties.dtype.itemsize
        total, numel = total + size, numel + math.prod(value.size)
        chunk = _shape(value.chunks[0].sizes)
        table.add_row(
            key, _shape(value.size), _dtype(value.properties.dtype), str(len(value.chunks)), chunk, f"{size / 1e6:,.3f}"
        )
    _print_wide(console, table)
    files = len({info.relative_path for info in metadata.storage_data.values()})
    console.print(
        f"{path}: Megatron torch_dist, iteration {iteration}, {_layout(path, metadata)}, {numel:,} parameters with the "
        f"vocabulary's padding, {decimal(total)}, files: {files}, tensors that are not of the model: {other}",
        soft_wrap=True,
    )


def _layout(path: Path, metadata: Metadata) -> str:
    """The layout that a checkpoint says it was written in. It can be loaded in any other."""
    try:
        args = read_common(path, metadata).get("args")
    except Exception:  # can hold anything, including classes that must not be loaded
        args = None
    sizes = [
        ("TP", "tensor_model_parallel_size"),
        ("PP", "pipeline_model_parallel_size"),
        ("VPP", "virtual_pipeline_model_parallel_size"),
        ("EP", "expert_model_parallel_size"),
    ]
    known = [f"{name} {getattr(args, field, None) or 1}" for name, field in sizes if args is not None]
    return " ".join(known) or "layout not recorded"


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in ("MB", "chunks") else "left")
    return table


def _print_wide(console: Console, table: Table) -> None:
    """Print a table as wide as it is, so that names stay whole and can be searched for."""
    table.width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.print(table, soft_wrap=True)


def _shape(sizes) -> str:
    return " x ".join(map(str, sizes))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
