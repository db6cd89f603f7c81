"""What `rlad convert` prints: the dry run, tables of tensors, progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from torch.distributed.checkpoint import Metadata

from rlad_megatron.convert.targets import MegatronTarget, Target
from rlad_megatron.models.load import HfCheckpoint
from rlad_megatron.models.megatron_folder import find_iteration, is_megatron
from rlad_megatron.models.megatron_tensors import MODEL_PREFIXES
from rlad_megatron.models.torch_dist import read_common, read_metadata, tensors_in

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
    else:
        table.add_row("tensors", str(len(target.tensors)))
        table.add_row("files", str(target.files.count))
    table.add_row("dtype", conversion.dtype)
    table.add_row("bytes written", f"{target.total:,}")
    table.add_row("processes", str(conversion.processes))
    largest = conversion.largest(target.source)
    table.add_row("largest parameter", f"{largest / 1e6:,.1f} MB")
    memory = (2 * largest + SMALL_BYTES) / 1e6
    table.add_row("memory of each process", f"at most {memory:,.0f} MB over the interpreter's own")
    console.print(table)


def print_tensors(console: Console, folder: str | Path) -> None:
    """A table of names, shapes, dtypes, layout and sizes of a checkpoint in either format."""
    rows: list[tuple]  # name, shape, dtype, what only this format has
    if is_megatron(folder):
        path, iteration = find_iteration(folder)
        metadata = read_metadata(path)
        tensors = tensors_in(metadata)
        headers: tuple[str, ...] = ("chunks", "of shape")
        rows = [
            (key, value.size, value.properties.dtype, str(len(value.chunks)), _shape(value.chunks[0].sizes))
            for key, value in tensors.items()
            if key.startswith(MODEL_PREFIXES)
        ]
        files = {info.relative_path for info in metadata.storage_data.values()}
        start = f"{path}: Megatron torch_dist, iteration {iteration}, {_layout(path, metadata)}"
        padding, end = (
            " with the vocabulary's padding",
            f", tensors that are not of the model: {len(tensors) - len(rows)}",
        )
    else:
        checkpoint = HfCheckpoint(folder)
        headers = ("file",)
        rows = [
            (name, checkpoint.stored_shape(name), checkpoint.stored_dtype(name), file.name)
            for name, file in checkpoint.files.items()
        ]
        files = set(checkpoint.files.values())
        start, padding, end = f"{folder}: Hugging Face", "", ""
    table = Table(box=None, pad_edge=False)
    for header in ("tensor", "shape", "dtype", *headers, "MB"):
        table.add_column(header, justify="right" if header in ("MB", "chunks") else "left")
    total = 0
    for name, shape, dtype, *others in sorted(rows, key=lambda row: row[0]):
        size = math.prod(shape) * dtype.itemsize
        total += size
        table.add_row(name, _shape(shape), str(dtype).removeprefix("torch."), *others, f"{size / 1e6:,.3f}")
    # As wide as it is, so that names stay whole and can be searched for.
    table.width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.print(table, soft_wrap=True)
    numel = sum(math.prod(shape) for _, shape, *_ in rows)
    console.print(f"{start}, {numel:,} parameters{padding}, {decimal(total)}, files: {len(files)}{end}", soft_wrap=True)


def _layout(path: Path, metadata: Metadata) -> str:
    """The layout that a checkpoint says it was written in. It can be loaded in any other."""
    try:
        args = read_common(path, metadata).get("args")
    except Exception:  # can hold anything, including classes that must not be loaded
        args = None
    if args is None:
        return "layout not recorded"
    kinds = {"TP": "tensor", "PP": "pipeline", "VPP": "virtual_pipeline", "EP": "expert"}
    return " ".join(f"{key} {getattr(args, f'{kind}_model_parallel_size', None) or 1}" for key, kind in kinds.items())


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
