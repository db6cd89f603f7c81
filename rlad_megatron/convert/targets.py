"""What a conversion reads and writes.

Source and target are each in either format. Both are seen as Hugging Face tensors, which the shard plan knows how to
cut, so `hf-to-megatron`, `megatron-to-hf` and `reshard` differ in source and target alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from rlad_megatron.config import LayoutConfig
from rlad_megatron.convert.dtypes import DTYPES, check_range
from rlad_megatron.convert.layout import CheckpointLayout, Chunk, split_evenly
from rlad_megatron.convert.megatron_files import lay_out_files, write_file, write_rest
from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.export import set_dtype
from rlad_megatron.models.hf_config import load_hf_config
from rlad_megatron.models.load import Checkpoint, copy_side_files, open_checkpoint
from rlad_megatron.models.safetensors_files import MAX_SHARD_BYTES, SafetensorsFiles
from rlad_megatron.models.shard_plan import build_shard_plan
from rlad_megatron.models.torch_dist import RELEASE, TRACKER, model_blocks


@dataclass(frozen=True)
class Conversion:
    """What to convert into what. Every process holds one and comes to the same plan."""

    source: str  # folder, in either format
    target: str  # folder that does not exist or is empty
    config: str  # folder with config.json and the tokenizer's files
    layout: CheckpointLayout | None  # of a Megatron target; None: the target is in Hugging Face format
    dtype: str = "keep"  # keep | bfloat16 | float16 | float32
    processes: int = 1
    iteration: str = RELEASE  # of a Megatron target: a number, or "release"
    max_shard_bytes: int = MAX_SHARD_BYTES  # of a Hugging Face target

    @cached_property
    def hf_config(self):
        return load_hf_config(self.config)

    @property
    def final(self) -> Path:
        return Path(self.target).resolve()

    @property
    def temporary(self) -> Path:
        return self.final.with_name(self.final.name + ".tmp")

    @property
    def iteration_name(self) -> str:
        return RELEASE if self.iteration == RELEASE else f"iter_{int(self.iteration):07d}"

    def open_source(self) -> Checkpoint:
        return open_checkpoint(self.source, self.hf_config)

    def dtype_of(self, name: str, source: Checkpoint) -> torch.dtype:
        """What a Hugging Face tensor is written in."""
        return DTYPES[self.dtype] or source.dtype(name)

    def largest(self, source: Checkpoint) -> int:
        """Bytes of the largest parameter, in the wider of the dtypes that it is read and written in."""
        return max(
            block.numel * max(dtype.itemsize for dtype in (source.dtype(name), self.dtype_of(name, source)))
            for block in model_blocks(self.hf_config)
            for name in {piece.hf_name for piece in block.pieces}
        )


class MegatronTarget:
    """Writes a Megatron checkpoint."""

    def __init__(self, conversion: Conversion, source: Checkpoint) -> None:
        self.conversion, self.source = conversion, source
        self.folder = conversion.temporary / conversion.iteration_name
        self._dtypes: dict[str, torch.dtype] = {}  # a key has one for all layers
        self.files, self.metadata = lay_out_files(
            conversion.hf_config, conversion.layout, self._dtype_of, conversion.processes
        )
        chunks = [chunk for file in self.files for chunk in file.chunks]
        self.total = sum(chunk.numel * self._dtypes[chunk.block.key].itemsize for chunk in chunks)
        self.largest = conversion.largest(source)

    def _dtype_of(self, chunk: Chunk) -> torch.dtype:
        dtypes = {self.conversion.dtype_of(piece.hf_name, self.source): piece.hf_name for piece in chunk.block.pieces}
        if len(dtypes) > 1:
            (one, first), (other, second) = list(dtypes.items())[:2]
            raise CheckpointError(
                f"{self.source.path}: tensors {first!r} ({one}) and {second!r} ({other}) become one Megatron "
                "parameter but differ in dtype; choose one with --dtype"
            )
        (dtype,) = dtypes
        if self._dtypes.setdefault(chunk.block.key, dtype) != dtype:
            raise CheckpointError(
                f"{self.source.path}: tensor {chunk.block.pieces[0].hf_name!r} has {dtype}, but that of another layer "
                f"{self._dtypes[chunk.block.key]}; Megatron stacks them, so choose one with --dtype"
            )
        return dtype

    def create(self) -> None:
        self.folder.mkdir(parents=True)

    def write(self, process: int, on_bytes: Callable[[int], None]) -> list:
        results = []
        for file in self.files[process :: self.conversion.processes]:
            if file.plan.items:
                results.append(write_file(file, self.folder, self.source, on_bytes))
        self.source.release()
        return results

    def finish(self, results: list[list]) -> None:
        conversion = self.conversion
        write_rest(self.folder, self.metadata, results, conversion.hf_config, conversion.layout, conversion.iteration)
        copy_side_files(conversion.config, conversion.temporary)
        (conversion.temporary / TRACKER).write_text(conversion.iteration)


class HfTarget:
    """Writes a Hugging Face folder."""

    def __init__(self, conversion: Conversion, source: Checkpoint) -> None:
        self.conversion, self.source = conversion, source
        shapes = build_shard_plan(conversion.hf_config, LayoutConfig()).hf_shapes
        self.tensors = {name: (shape, conversion.dtype_of(name, source)) for name, shape in shapes.items()}
        self.files = SafetensorsFiles(conversion.temporary, self.tensors, conversion.max_shard_bytes)
        self._sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values()]
        self.total = sum(self._sizes)
        self.largest = conversion.largest(source)

    def create(self) -> None:
        self.conversion.temporary.mkdir(parents=True)
        self.files.create()

    def write(self, process: int, on_bytes: Callable[[int], None]) -> list:
        names = list(self.tensors)
        for at in split_evenly(self._sizes, self.conversion.processes)[process]:
            shape, dtype = self.tensors[names[at]]
            tensor = self.source.read(names[at], [(0, size) for size in shape]).to(dtype)
            check_range(tensor, names[at], self.source)
            self.files.write(names[at], tensor)
            on_bytes(self._sizes[at])
            del tensor  # before the next one is read
        self.source.release()
        return []

    def finish(self, results: list[list]) -> None:
        copy_side_files(self.conversion.config, self.conversion.temporary)
        dtypes = {dtype for _, dtype in self.tensors.values()}
        if len(dtypes) == 1:
            set_dtype(self.conversion.temporary / "config.json", dtypes.pop())


Target = MegatronTarget | HfTarget


def open_target(conversion: Conversion) -> Target:
    """Open the source, check it against the configuration, and plan the target.

    Raises:
        RladError: the source is damaged or of another model, or the layout cannot be.
    """
    source = conversion.open_source()
    source.check(build_shard_plan(conversion.hf_config, LayoutConfig()))
    return HfTarget(conversion, source) if conversion.layout is None else MegatronTarget(conversion, source)


def check_output(conversion: Conversion) -> None:
    """Raise CheckpointError where the target is there already, ConfigError where no process would write it."""
    final = conversion.final
    if final == Path.cwd():
        raise CheckpointError(f"{conversion.target}: the current folder, which cannot be replaced; name another one")
    if final.exists() and not final.is_dir():
        raise CheckpointError(f"{conversion.target}: is a file; choose another name")
    if final.exists() and any(final.iterdir()):
        raise CheckpointError(f"{conversion.target}: not empty; choose another folder, or remove this one first")
    if conversion.processes < 1:
        raise ConfigError(f"--processes {conversion.processes} must be at least 1")
