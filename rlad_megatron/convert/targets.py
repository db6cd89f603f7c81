"""The source and the target of a conversion.

Each can be in either format. The code sees both as Hugging Face tensors, which the shard plan cuts, so
`hf-to-megatron`, `megatron-to-hf` and `reshard` differ only in source and target.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from rlad_megatron import platform
from rlad_megatron.config import LayoutConfig
from rlad_megatron.convert.layout import CheckpointLayout, Chunk, split_evenly
from rlad_megatron.convert.megatron_files import check_values, lay_out_files, write_file, write_rest
from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.box import Box
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.models.load import Checkpoint, HfCheckpoint, open_checkpoint, print_left_out
from rlad_megatron.models.megatron_folder import RELEASE, TRACKER, is_megatron
from rlad_megatron.models.megatron_tensors import Block, model_blocks
from rlad_megatron.models.safetensors_files import MAX_SHARD_BYTES, SafetensorsFiles, set_dtype, write_text_config
from rlad_megatron.models.shard_plan import ShardPlan, build_shard_plan
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.models.stored import Stored

KEEP = "keep"  # each tensor's dtype as it is read


@dataclass(frozen=True)
class Conversion:
    """What to convert into what."""

    source: str  # folder, in either format
    target: str  # folder that does not exist or is empty
    config: str  # folder with config.json and the tokenizer's files
    layout: CheckpointLayout | None  # of a Megatron target; None for a Hugging Face target
    dtype: str = KEEP  # or a name of config.dtypes
    processes: int = 1
    iteration: str = RELEASE  # of a Megatron target: a number, or "release"
    max_shard_bytes: int = MAX_SHARD_BYTES  # of a Hugging Face target
    # A Hugging Face folder whose vision tower and layers for multi-token prediction a Hugging Face target gets too.
    like: str | None = None

    @cached_property
    def spec(self) -> ModelSpec:
        return read_model_spec(self.config)

    @property
    def changes_format(self) -> bool:
        return (self.layout is None) == is_megatron(self.source)

    @property
    def final(self) -> Path:
        return Path(self.target).resolve()

    @property
    def temporary(self) -> Path:
        return self.final.with_name(self.final.name + ".tmp")

    @property
    def iteration_name(self) -> str:
        return RELEASE if self.iteration == RELEASE else f"iter_{int(self.iteration):07d}"

    def dtype_of(self, name: str, source: Checkpoint) -> torch.dtype:
        """The dtype that a Hugging Face tensor is written in."""
        if self.dtype == KEEP:
            return source.dtype(name)
        return torch.float32 if name in self.plan.float32 else platform.DTYPES[self.dtype]

    @cached_property
    def plan(self) -> ShardPlan:
        """Of the whole model on one rank."""
        return build_shard_plan(self.spec, LayoutConfig())

    def largest(self, source: Checkpoint) -> int:
        """Bytes of the largest parameter, in the wider of its dtypes on reading and on writing."""
        return max(
            block.numel * max(dtype.itemsize for dtype in (source.dtype(name), self.dtype_of(name, source)))
            for block in model_blocks(self.spec)
            for name in block.names
        )


class MegatronTarget:
    """Writes a Megatron checkpoint."""

    def __init__(self, conversion: Conversion, source: Checkpoint, layout: CheckpointLayout) -> None:
        self.conversion, self.source, self.layout = conversion, source, layout
        self.folder = conversion.temporary / conversion.iteration_name
        self._dtypes: dict[str, torch.dtype] = {}  # by key, the same for all layers
        self.files, self.metadata = lay_out_files(conversion.spec, layout, self._dtype_of, conversion.processes)
        chunks = [chunk for file in self.files for chunk in file.chunks]
        self.total = sum(chunk.box.numel * self._dtypes[chunk.block.key].itemsize for chunk in chunks)

    def _dtype_of(self, chunk: Chunk) -> torch.dtype:
        dtypes = {self.conversion.dtype_of(name, self.source): name for name in chunk.block.names}
        if len(dtypes) > 1:
            (one, first), (other, second) = list(dtypes.items())[:2]
            raise CheckpointError(
                f"{self.source.path}: tensors {first!r} ({one}) and {second!r} ({other}) become one Megatron "
                "parameter but differ in dtype; choose one with --dtype"
            )
        (dtype,) = dtypes
        if chunk.block.offset:
            dtype = self._exact_dtype(chunk.block, dtype)
        if self._dtypes.setdefault(chunk.block.key, dtype) != dtype:
            raise CheckpointError(
                f"{self.source.path}: tensor {chunk.block.names[0]!r} has {dtype}, but that of another layer "
                f"{self._dtypes[chunk.block.key]}; Megatron stacks them, so choose one with --dtype"
            )
        return dtype

    def _exact_dtype(self, block: Block, dtype: torch.dtype) -> torch.dtype:
        """The dtype that holds a small parameter with its offset, and loses nothing, if float32 can."""
        (name,) = block.names
        values = self.source.read(name, Box.whole(block.shape)).to(dtype)
        back = (values.double() + block.offset).to(dtype).double() - block.offset
        return dtype if torch.equal(back, values.double()) else torch.float32

    def create(self) -> None:
        self.folder.mkdir()

    def write(self, process: int, on_bytes: Callable[[int], None]) -> list:
        files = [file for file in self.files[process :: self.conversion.processes] if file.plan.items]
        results = [write_file(file, self.folder, self.source, on_bytes) for file in files]
        self.source.release()
        return results

    def finish(self, results: list[list]) -> Path:
        """Returns the folder of the files."""
        conversion = self.conversion
        write_rest(self.folder, self.metadata, results, conversion.spec, self.layout, conversion.iteration)
        (conversion.temporary / TRACKER).write_text(conversion.iteration)
        return self.folder


class HfTarget:
    """Writes a Hugging Face folder: a text model, or with `Conversion.like` a whole model like that one."""

    def __init__(self, conversion: Conversion, source: Checkpoint) -> None:
        self.conversion, self.source = conversion, source
        self._whole = _open_whole(conversion.like, conversion.plan) if conversion.like else None
        shapes = conversion.plan.hf_shapes
        self._parts: dict[str, list[tuple[str, Stored]]] = defaultdict(list)  # the source's tensors, by written name
        for name in shapes:
            place = self._whole.stored[name] if self._whole else Stored(name)
            self._parts[place.name].append((name, place))
        self.tensors = {}
        for written, parts in self._parts.items():
            shape = self._whole.stored_shape(written) if self._whole else shapes[written]
            self.tensors[written] = shape, conversion.dtype_of(parts[0][0], source)
        if self._whole:
            for name in self._whole.left_out:
                self.tensors[name] = self._whole.stored_shape(name), self._whole.stored_dtype(name)
        self.files = SafetensorsFiles(conversion.temporary, self.tensors, conversion.max_shard_bytes)
        self._sizes = [Box.whole(shape).numel * dtype.itemsize for shape, dtype in self.tensors.values()]
        self.total = self.files.total_bytes

    def create(self) -> None:
        self.files.create()

    def write(self, process: int, on_bytes: Callable[[int], None]) -> list:
        names = list(self.tensors)
        for at in split_evenly(self._sizes, self.conversion.processes)[process]:
            self.files.write(names[at], self._read(names[at]))
            on_bytes(self._sizes[at])
        self.source.release()
        return []

    def _read(self, written: str) -> torch.Tensor:
        shape, dtype = self.tensors[written]
        if self._whole and written not in self._parts:
            return self._whole.read_stored(written)
        tensor = torch.empty(shape, dtype=dtype)
        for name, place in self._parts[written]:
            read = self.source.read(name, Box.whole(self.conversion.plan.hf_shapes[name]))
            target = tensor if place.part is None else tensor[place.part.slices][0]
            target.copy_(read)
            check_values(target, read, name, self.source)
        return tensor

    def finish(self, results: list[list]) -> Path:
        """Returns the folder of the files."""
        float32 = self.conversion.plan.float32
        dtypes = {self.tensors[written][1] for written, parts in self._parts.items() if parts[0][0] not in float32}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        config_file = self.conversion.temporary / "config.json"
        if self._whole is None:
            write_text_config(config_file, dtype)
        elif dtype is not None:
            set_dtype(config_file, dtype)
        return self.conversion.temporary


def _open_whole(folder: str, plan: ShardPlan) -> HfCheckpoint:
    """A model with parts that the text model lacks. Raises CheckpointError if it has none, or is of another size."""
    checkpoint = HfCheckpoint(folder)
    checkpoint.check(plan)
    if not checkpoint.left_out:
        raise CheckpointError(f"--like {folder}: has no vision tower or other weights to carry along; leave it out")
    return checkpoint


Target = MegatronTarget | HfTarget


def open_target(conversion: Conversion) -> Target:
    """Open the source, check it against config.json, and lay out the target.

    Raises:
        RladError: the source is damaged or of another model, or the layout is impossible.
    """
    source = open_checkpoint(conversion.source, conversion.spec)
    source.check(conversion.plan)
    print_left_out(source)
    if conversion.layout is None:
        return HfTarget(conversion, source)
    return MegatronTarget(conversion, source, conversion.layout)


def check_output(conversion: Conversion) -> None:
    """Raise CheckpointError if the target exists already, ConfigError if no process would write it."""
    final = conversion.final
    if final == Path.cwd():
        raise CheckpointError(f"{conversion.target}: the current folder cannot be replaced; choose another one")
    if final.exists() and not final.is_dir():
        raise CheckpointError(f"{conversion.target}: is a file; choose another name")
    if final.exists() and any(final.iterdir()):
        raise CheckpointError(f"{conversion.target}: not empty; choose another folder, or remove this one first")
    if conversion.processes < 1:
        raise ConfigError(f"--processes {conversion.processes} must be at least 1")
