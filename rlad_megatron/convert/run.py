"""The verbs of `rlad convert`: convert and verify, with their progress bars."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal

from rlad_megatron import platform
from rlad_megatron.config import LayoutConfig
from rlad_megatron.convert.logits import check_comparison, prepare_comparison
from rlad_megatron.convert.tables import progress
from rlad_megatron.convert.targets import KEEP, Conversion, check_output, open_target
from rlad_megatron.convert.verify import compare, sample_blocks
from rlad_megatron.convert.workers import start
from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.checkpoint_files import check_undamaged, digests_of, read_digests, write_digests
from rlad_megatron.models.load import Checkpoint, copy_side_files, open_checkpoint
from rlad_megatron.models.megatron_tensors import model_blocks
from rlad_megatron.models.shard_plan import build_shard_plan
from rlad_megatron.models.spec import ModelSpec


def convert(conversion: Conversion, console: Console, *, verify: bool) -> None:
    """Convert, compare the result with the source, and only then give the result its name.

    The comparison is a sample of tensors. If config.json has unknown fields, one side is run by transformers and the
    other by Megatron-Core, and their logits are compared; two sides of one format have no such pair.

    Raises:
        RladError: the source is damaged, the layout is impossible, the disk is full, ...; nothing is left behind.
    """
    check_output(conversion)
    target = open_target(conversion)
    compare_logits = verify and conversion.changes_format and bool(conversion.spec.unknown_fields)
    if compare_logits:
        check_comparison(conversion.spec, conversion.source if conversion.layout is None else None)
    started = time.monotonic()
    with output_folder(conversion):
        check_space(conversion, target.total)
        digests = source_digests(console, target.source)
        target.create()
        with start(target) as finish, progress(console, "converting", target.total) as on_bytes:
            results = finish(on_bytes)
        copy_side_files(conversion.config, conversion.temporary)
        folder = target.finish(results)
        written = open_checkpoint(folder, conversion.spec)
        write_digests(folder, digests_of(folder, written.file_names()), digests)
        seconds = time.monotonic() - started
        folders = conversion.source, str(conversion.temporary)
        if compare_logits:
            dtype = None if conversion.dtype == KEEP else platform.DTYPES[conversion.dtype]
            prepare_comparison(*folders, conversion.spec, dtype=dtype).verify(
                console,
                remedy="an unknown field of config.json may be the reason: use a model without it, or --no-verify and "
                "then `rlad convert verify --logits --bound X`",
            )
        elif verify:
            verify_folders(console, *folders, conversion.spec, sample=True, digests=False)
    console.print(
        f"{conversion.target}: {decimal(target.total)} in {seconds:.1f} s "
        f"({decimal(int(target.total / max(seconds, 1e-9)))}/s)",
        soft_wrap=True,
    )


def source_digests(console: Console, source: Checkpoint) -> dict[str, str]:
    """The digests of the source's files. CheckpointError if one is not as it was written."""
    check_undamaged(source.path)
    if recorded := read_digests(source.path):
        return recorded
    names = source.file_names()
    with progress(console, "reading   ", sum((source.path / name).stat().st_size for name in names)) as on_bytes:
        return digests_of(source.path, names, on_bytes)


def check_space(conversion: Conversion, needed: int) -> None:
    """Raise CheckpointError if the disk is too small."""
    parent = next(folder for folder in conversion.final.parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{conversion.target}: needs {needed:,} bytes, but {parent} has {free:,} free; "
            "free some space or choose another folder"
        )


@contextmanager
def output_folder(conversion: Conversion) -> Iterator[None]:
    """A temporary folder that gets the target's name at the end; a failure leaves nothing."""
    shutil.rmtree(conversion.temporary, ignore_errors=True)  # left by a conversion that was killed
    try:
        conversion.temporary.mkdir(parents=True)
        yield
        os.replace(conversion.temporary, conversion.final)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or conversion.temporary}: {error.strerror}; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(conversion.temporary, ignore_errors=True)


def verify_folders(
    console: Console, first: str, second: str, spec: ModelSpec, *, sample: bool, digests: bool = True
) -> None:
    """Compare the tensors of two checkpoints, and each with its own digests, and print the result.

    Raises:
        CheckpointError: they differ, or one of them is damaged or not of the model.
    """
    plan = build_shard_plan(spec, LayoutConfig())
    ours, theirs = (open_checkpoint(folder, spec) for folder in (first, second))
    for checkpoint in (ours, theirs):
        checkpoint.check(plan)
        if digests:
            check_undamaged(checkpoint.path)
    blocks = sample_blocks(spec) if sample else model_blocks(spec)
    names = {name for block in blocks for name in block.names}
    total = sum(block.numel * ours.dtype(block.names[0]).itemsize for block in blocks)
    with progress(console, "verifying ", total) as on_bytes:
        differences = compare(ours, theirs, spec, blocks, on_bytes)
    for difference in differences:
        console.print(f"  {difference}", soft_wrap=True)
    if differences:
        raise CheckpointError(
            f"{first} and {second} differ in {len(differences)} of {len(names)} tensors; the first is {differences[0]}"
        )
    what = " a sample" if sample else ""
    console.print(f"verified{what}: {len(names)} of {len(plan.hf_shapes)} tensors, all identical", soft_wrap=True)
