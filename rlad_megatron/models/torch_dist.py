"""Megatron-Core's distributed checkpoints (`torch_dist`): reading parts of them.

A checkpoint stores whole parameters (models/megatron_tensors.py), cut into chunks at arbitrary places. Files:
`.metadata` and `*.distcp` of torch.distributed.checkpoint, `common.pt` for everything but tensors (from Megatron-Core
0.19 on the object "common_state" among the tensors), `metadata.json` for the format's version (source:
megatron/core/dist_checkpointing).
"""

from __future__ import annotations

import io
import json
import pickle
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint import metadata as metadata_module
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.utils import _create_file_view

from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.box import Box
from rlad_megatron.models.checkpoint_files import DIGESTS, file_in
from rlad_megatron.models.megatron_folder import find_iteration
from rlad_megatron.models.megatron_tensors import MODEL_PREFIXES, Block, key_of_layer, model_blocks
from rlad_megatron.models.rules import Piece
from rlad_megatron.models.shard_plan import ShardPlan, refuse_unknown
from rlad_megatron.models.spec import ModelSpec

COMMON = "common.pt"
SEVERAL = -1  # in place of a layer

_DCP = "torch.distributed.checkpoint"
_METADATA_CLASSES = {
    *((f"{_DCP}.metadata", name) for name in metadata_module.__all__),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    (f"{_DCP}.planner", "BytesIOWriteData"),
    *((f"{_DCP}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
# Subclasses that Megatron-Core had up to 0.15.
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_OLD_CLASSES = {(_MCORE, "MCoreMetadata"): Metadata, (_MCORE, "MCoreSavePlan"): SavePlan}


class MegatronCheckpoint:
    """A torch_dist checkpoint of any layout, read slice by slice as Hugging Face tensors.

    Has the interface of `HfCheckpoint`. Holds one uncut parameter at a time.

    Raises:
        CheckpointError: files are missing or truncated, or tensors are not of this model.
    """

    def __init__(self, path: str | Path, spec: ModelSpec) -> None:
        self.path, self.iteration = find_iteration(path)
        self.metadata = read_metadata(self.path)
        self._tensors = tensors_in(self.metadata)
        self._grids: dict[str, dict[int, list]] = {}
        self.blocks = model_blocks(spec)
        self._blocks_of: defaultdict[str, list[Block]] = defaultdict(list)
        for block in self.blocks:
            for name in block.names:
                self._blocks_of[name].append(block)
        self._held: tuple[Block, torch.Tensor] | None = None
        self._check_files()

    def _check_files(self) -> None:
        needed: defaultdict[str, int] = defaultdict(int)
        for info in self.metadata.storage_data.values():
            needed[info.relative_path] = max(needed[info.relative_path], info.offset + info.length)
        for name, size in sorted(needed.items()):
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: not found, though .metadata lists it; copy the checkpoint again")
            if file.stat().st_size < size:
                raise CheckpointError(
                    f"{file}: truncated, {file.stat().st_size} of at least {size} bytes; copy the checkpoint again"
                )

    def file_names(self) -> list[str]:
        """The files that a digest is kept of."""
        return [file.name for file in self.path.iterdir() if file.is_file() and file.name != DIGESTS]

    def locate(self, block: Block) -> tuple[str, tuple[int, ...]]:
        """(key, position on its leading axes) of a block in this checkpoint.

        Megatron stacks layers under one key or, for models whose layers differ, writes one key per layer.
        """
        names = [(block.key, block.index)]
        if block.index and block.index == block.place:
            names.append((key_of_layer(block.key, block.index[0]), block.index[1:]))
        if block.own_key != block.key:
            names.append((block.own_key, block.index))
        # Megatron's own layers, unlike Transformer Engine's, rename this norm even before experts.
        old, new = ".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"
        names += [(key.replace(old, new), index) for key, index in names if old in key]
        for key, index in names:
            if key in self._tensors:
                return key, index
        raise CheckpointError(f"{self.path}: tensor {block.key!r} is missing; the checkpoint is not of this model")

    def dtype(self, name: str) -> torch.dtype:
        key, _ = self.locate(self._blocks_of[name][0])
        return self._tensors[key].properties.dtype

    def check(self, plan: ShardPlan) -> None:
        """Raise CheckpointError if a tensor is missing, unknown or of a wrong shape."""
        assert set(plan.hf_shapes) == set(self._blocks_of)
        known = set()
        for block in self.blocks:
            key, index = self.locate(block)
            known.add(key)
            stored = tuple(self._tensors[key].size)
            expected = (*block.counts[len(block.counts) - len(index) :], *block.shape)
            padded = block.rule.cut == "vocabulary" and stored[0] >= expected[0] and stored[1:] == expected[1:]
            if not padded and stored != expected:
                raise CheckpointError(
                    f"{self.path}: tensor {key!r} has shape {stored}, config.json asks for {expected}; "
                    "the two are not of one model"
                )
        refuse_unknown({key: self.path for key in self._tensors if key.startswith(MODEL_PREFIXES) and key not in known})

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A part of a Hugging Face tensor, in the checkpoint's dtype."""
        target = None
        for block, piece, overlap in self._pieces_in(name, box):
            if self._held is None or self._held[0] is not block:
                self._held = None  # before the next one is read
                self._held = (block, self.read_block(block))
            source = self._held[1][overlap.shift(piece.hf_slices, piece.local_slices).slices]
            if overlap == box:
                return source
            if target is None:
                target = torch.empty(box.sizes, dtype=source.dtype)
            target[overlap.shift(box).slices].copy_(source)
        assert target is not None, (name, box)
        return target

    def _pieces_in(self, name: str, box: Box) -> Iterator[tuple[Block, Piece, Box]]:
        """The pieces of a Hugging Face tensor that overlap `box`, with their blocks and the overlap in the tensor."""
        for block in self._blocks_of[name]:
            for piece in block.pieces:
                overlap = box.intersect(piece.hf_slices) if piece.hf_name == name else None
                if overlap is not None:
                    yield block, piece, overlap

    def read_block(self, block: Block) -> torch.Tensor:
        """A whole parameter without the vocabulary's padding."""
        key, index = self.locate(block)
        box = Box.at((*index, *[0] * len(block.shape)), (*[1] * len(index), *block.shape))
        values = self._read_box(key, box).reshape(block.shape)
        return values - block.offset if block.offset and key != block.own_key else values

    def _read_box(self, key: str, box: Box) -> torch.Tensor:
        """A part of a stored tensor, from the chunks that it overlaps."""
        dtype = self._tensors[key].properties.dtype
        target, covered = torch.empty(box.sizes, dtype=dtype), 0  # takes no memory until it is written to
        for index, sizes in self._chunks(key, box):
            place = Box.at(index.offset, sizes)
            overlap = box.intersect(place)
            if overlap is None:
                continue
            chunk = self._load_chunk(index, dtype, sizes)
            if place == box:
                return chunk  # so that a large parameter is not held twice
            target[overlap.shift(box).slices].copy_(chunk[overlap.shift(place).slices])
            covered += overlap.numel
            del chunk  # before the next one is read
        if covered != box.numel:
            raise CheckpointError(f"{self.path}: chunks of tensor {key!r} are missing; copy the checkpoint again")
        return target

    def _load_chunk(self, index: MetadataIndex, dtype: torch.dtype, sizes: torch.Size) -> torch.Tensor:
        info = self.metadata.storage_data[index]
        file = self.path / info.relative_path
        try:
            with open(file, "rb") as stream:
                view = _create_file_view(stream, info.offset, info.length)
                chunk = torch.load(view, map_location="cpu", weights_only=True)
            if (chunk.dtype, chunk.shape) != (dtype, sizes):
                raise ValueError(f"{chunk.dtype} {tuple(chunk.shape)}, but .metadata says {dtype} {tuple(sizes)}")
        except Exception as error:  # chunks are archives with pickles; damaged ones raise anything
            raise CheckpointError(
                f"{file}: tensor {index.fqn!r} cannot be read ({_in_a_line(error)}); copy the checkpoint again"
            ) from error
        return chunk

    def _chunks(self, key: str, box: Box) -> list[tuple[MetadataIndex, torch.Size]]:
        """(index, sizes) of the stored chunks of a tensor that may overlap `box`: all, or those of one layer."""
        if key not in self._grids:
            self._grids[key] = defaultdict(list)
            for number, chunk in enumerate(self._tensors[key].chunks):
                layer = chunk.offsets[0] if chunk.sizes[0] == 1 else SEVERAL
                self._grids[key][layer].append((MetadataIndex(key, chunk.offsets, number), chunk.sizes))
        grid = self._grids[key]
        return grid[box[0][0]] + grid[SEVERAL] if box.sizes[0] == 1 else [*chain(*grid.values())]

    def release(self) -> None:
        """Drop the parameter that is held."""
        self._held = None


def read_metadata(folder: Path) -> Metadata:
    """The list of a checkpoint's contents, from an iteration's folder.

    Raises:
        CheckpointError: another format, or damaged.
    """
    file = folder / "metadata.json"
    try:
        backend = json.loads(file.read_text()).get("sharded_backend") if file.is_file() else "torch_dist"
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); copy the checkpoint again") from error
    if backend != "torch_dist":
        raise CheckpointError(f"{file}: format {backend!r} is not covered; save it as torch_dist")
    file = folder / ".metadata"
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"holds a {type(metadata).__name__}")
        for info in metadata.storage_data.values():
            file_in(folder, info.relative_path, file)
        tensors_in(metadata)
        return metadata
    except CheckpointError:
        raise
    except Exception as error:  # damaged pickles raise anything
        raise CheckpointError(f"{file}: cannot be read ({_in_a_line(error)}); copy the checkpoint again") from error


def read_common(folder: Path, metadata: Metadata) -> dict:
    """Everything in a checkpoint but its tensors; contains "args" if Megatron-LM wrote it.

    Args:
        folder: an iteration's.

    Raises:
        Exception: torch.load's, if the file is missing, damaged, or contains classes that must not be loaded.
    """
    entry = metadata.storage_data.get(MetadataIndex("common_state/shard_0_1"))
    with torch.serialization.safe_globals([Namespace]):
        if entry is None:
            return torch.load(folder / COMMON, weights_only=True)
        with open(folder / entry.relative_path, "rb") as file:
            file.seek(entry.offset)
            return torch.load(io.BytesIO(file.read(entry.length)), weights_only=True)[0]


class _MetadataUnpickler(pickle.Unpickler):
    """Admits only the classes of torch.distributed.checkpoint, and what their fields are made of.

    A pickle may name any function to be called. torch's own reader would call it.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OLD_CLASSES:
            return _OLD_CLASSES[module, name]
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _METADATA_CLASSES:  # a name with a dot is in neither
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata, and may be an attack")


def tensors_in(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint by key, without its other objects."""
    entries = metadata.state_dict_metadata.items()
    return {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _in_a_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
