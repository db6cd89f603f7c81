"""Megatron-Core's distributed checkpoints (`torch_dist`): how their tensors are named, and reading parts of them.

A checkpoint stores whole parameters, cut into chunks that no reader has to care about. Its tensors are those of the
shard plan at tensor-parallel size 1; parameters of the layers are stacked under one key, with the layer (and the
expert) as leading axes. Files: `.metadata` and `*.distcp` of torch.distributed.checkpoint, `common.pt` for what is no
tensor (from Megatron-Core 0.19 on the object "common_state" among the tensors), `metadata.json` for the format's
version (source: megatron/core/dist_checkpointing).

    FOLDER/latest_checkpointed_iteration.txt    a number, or "release"
    FOLDER/iter_0000050/ or FOLDER/release/     the checkpoint
"""

from __future__ import annotations

import io
import json
import math
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.registry import family_for
from rlad_megatron.models.rules import ModelShape, Piece, Rule, Slices, VocabParallel, model_shape, padded_vocab_size
from rlad_megatron.models.shard_plan import ShardPlan

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common.pt"
RELEASE = "release"
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")  # everything else is optimizer, rng, ...


@dataclass(frozen=True)
class Block:
    """One uncut Megatron parameter of one layer (and one expert), as a checkpoint stores it."""

    key: str  # in the checkpoint; the same for all layers
    index: tuple[int, ...]  # position on the leading axes: (), (layer,) or (layer, expert)
    counts: tuple[int, ...]  # sizes of the leading axes
    shape: tuple[int, ...]  # without the leading axes; the vocabulary unpadded
    rule: Rule
    pieces: tuple[Piece, ...]  # what it is made of

    @property
    def name(self) -> str:
        return f"{self.key}[{', '.join(map(str, self.index))}]" if self.index else self.key

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_vocabulary(self) -> bool:
        return isinstance(self.rule, VocabParallel)

    def stored_shape(self, tp: int) -> tuple[int, ...]:
        """Shape in a checkpoint that is written for this tensor-parallel size: the vocabulary is padded."""
        rows, *rest = self.shape
        return (padded_vocab_size(rows, tp) if self.is_vocabulary else rows, *rest)


def model_blocks(hf_config) -> list[Block]:
    """Every parameter of the model, in the order of the layers. A tied head is there once, as the embedding."""
    family, shape = family_for(hf_config), model_shape(hf_config)
    blocks = [_block(shape, name, rule, (), ()) for name, rule in family.embedding]
    for layer in range(shape.num_layers):
        for name, rule in family.layer:
            key = _stacked_key(name, family.checkpoint_names)
            if "{expert}" in name:
                counts = (shape.num_layers, shape.num_experts)
                for expert in range(shape.num_experts):
                    blocks.append(_block(shape, key, rule.at(layer, expert), (layer, expert), counts))
            else:
                blocks.append(_block(shape, key, rule.at(layer, 0), (layer,), (shape.num_layers,)))
    tail = family.final_norm if shape.tied else family.final_norm + family.head
    return blocks + [_block(shape, name, rule, (), ()) for name, rule in tail]


def _block(shape: ModelShape, key: str, rule: Rule, index: tuple[int, ...], counts: tuple[int, ...]) -> Block:
    full, pieces = rule.pieces(shape, 1, 0)
    if not index and len(full) == 2:
        full = (shape.vocab_size, *full[1:])
    return Block(key, index, counts, full, rule, pieces)


def _stacked_key(name: str, renamed: Iterable[tuple[str, str]]) -> str:
    """decoder.layers.{layer}.mlp.experts.local_experts.{expert}.x -> decoder.layers.mlp.experts.experts.x"""
    prefix, parameter = name.split("{layer}.")
    for old, new in renamed:
        if parameter.startswith(old):
            parameter = new + parameter.removeprefix(old)
    return prefix + parameter.replace("local_experts.{expert}.", "experts.")


def find_iteration(path: str | Path) -> tuple[Path, str]:
    """(folder with the checkpoint's files, iteration or "release") of a Megatron checkpoint folder.

    `path` may be the folder with the tracker file, an iteration's folder, or a run's checkpoint folder of the trainer.

    Raises:
        CheckpointError: no checkpoint there.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        number = path.name.removeprefix("iter_").removeprefix("step_")
        return path, str(int(number)) if number.isdigit() else RELEASE
    for tracker, folder in ((TRACKER, "iter_{:07d}"), ("latest", "step_{:08d}")):
        if (path / tracker).is_file():
            value = (path / tracker).read_text().strip()
            if value != RELEASE and not value.isdigit():
                raise CheckpointError(f"{path / tracker}: {value!r} is neither a number nor {RELEASE!r}; mend the file")
            found = path / (RELEASE if value == RELEASE else folder.format(int(value)))
            if any(found.glob("mp_rank_*")):
                raise CheckpointError(f"{found}: format 'torch' is not covered; save it with --ckpt-format torch_dist")
            if not (found / ".metadata").is_file():
                raise CheckpointError(f"{found}: .metadata not found, though {path / tracker} names it; copy it again")
            return found, value
    raise CheckpointError(f"{path}: neither {TRACKER} nor .metadata found; give a Megatron checkpoint (torch_dist)")


def read_common(folder: Path, metadata: Metadata) -> dict:
    """What a checkpoint holds that is no tensor, "args" among it if Megatron-LM wrote it.

    Args:
        folder: an iteration's.

    Raises:
        Exception: of torch.load, when there are classes in it that are not to be loaded, or nothing at all.
    """
    entry = metadata.storage_data.get(MetadataIndex("common_state/shard_0_1"))
    with torch.serialization.safe_globals([Namespace]):
        if entry is None:
            return torch.load(folder / COMMON, weights_only=True)
        with open(folder / entry.relative_path, "rb") as file:
            file.seek(entry.offset)
            return torch.load(io.BytesIO(file.read(entry.length)), weights_only=True)[0]


def is_megatron(path: str | Path) -> bool:
    """Whether the folder looks like a Megatron checkpoint rather than a Hugging Face one."""
    path = Path(path)
    if any((path / name).is_file() for name in (TRACKER, ".metadata")):
        return True
    return (path / "latest").is_file() and any(path.glob("step_*"))  # others leave a file "latest" in their folders too


class MegatronCheckpoint:
    """A torch_dist checkpoint, read as Hugging Face tensors, slice by slice, whatever layout it was written in.

    Has the interface of `HfCheckpoint`. Holds one uncut parameter at a time.

    Raises:
        CheckpointError: files missing or truncated, or tensors that are not of this model; named with the remedy.
    """

    def __init__(self, path: str | Path, hf_config) -> None:
        self.path, self.iteration = find_iteration(path)
        self.metadata = read_metadata(self.path)
        self._grids: dict[str, dict[int | None, list]] = {}
        self.blocks = model_blocks(hf_config)
        self._block_of = {piece.hf_name: block for block in self.blocks for piece in block.pieces}
        self._held: tuple[Block, torch.Tensor] | None = None
        self._check_files()

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for info in self.metadata.storage_data.values():
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
        for name, size in sorted(needed.items()):
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: not found, though .metadata lists it; copy the checkpoint again")
            if file.stat().st_size < size:
                raise CheckpointError(
                    f"{file}: truncated, {file.stat().st_size} of at least {size} bytes; copy the checkpoint again"
                )

    def locate(self, block: Block) -> tuple[str, tuple[int, ...]]:
        """(key, position on its leading axes) under which this checkpoint holds a block.

        Megatron writes layers stacked under one key, or, for models whose layers differ, one key for each layer.
        """
        per_layer = block.key
        if block.index:
            per_layer = block.key.replace("decoder.layers.", f"decoder.layers.{block.index[0]}.", 1)
        names = [(block.key, block.index), (per_layer, block.index[1:])]
        # Megatron's own layers, unlike Transformer Engine's, rename this norm also where experts follow it.
        old, new = ".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"
        names += [(key.replace(old, new), index) for key, index in names if old in key]
        for key, index in names:
            if isinstance(self.metadata.state_dict_metadata.get(key), TensorStorageMetadata):
                return key, index
        raise CheckpointError(f"{self.path}: tensor {block.key!r} is missing; the checkpoint is not of this model")

    def dtype(self, name: str) -> torch.dtype:
        key, _ = self.locate(self._block(name))
        return self.metadata.state_dict_metadata[key].properties.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a Hugging Face tensor, as the block that holds it has it."""
        self._check_shape(self._block(name))
        extents = [p.hf_slices for p in self._block(name).pieces if p.hf_name == name]
        return tuple(max(slices[axis][1] for slices in extents) for axis in range(len(extents[0])))

    def _block(self, name: str) -> Block:
        if name not in self._block_of:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing; the checkpoint is not of this model")
        return self._block_of[name]

    def _check_shape(self, block: Block) -> None:
        key, index = self.locate(block)
        stored = tuple(self.metadata.state_dict_metadata[key].size)
        leading, rest = stored[: len(index)], stored[len(index) :]
        fits = rest == block.shape or (
            block.is_vocabulary and len(rest) == 2 and rest[0] >= block.shape[0] and rest[1] == block.shape[1]
        )
        if not fits or leading != block.counts[len(block.counts) - len(index) :]:
            raise CheckpointError(
                f"{self.path}: tensor {key!r} has shape {stored}, config.json asks for "
                f"{(*block.counts[len(block.counts) - len(index) :], *block.shape)}; the two are not of one model"
            )

    def check(self, plan: ShardPlan) -> None:
        """Raise CheckpointError where a tensor is missing, of a wrong shape, or too many."""
        assert set(plan.hf_shapes) == set(self._block_of)
        known = set()
        for block in self.blocks:
            self._check_shape(block)
            known.add(self.locate(block)[0])
        unexpected = sorted(
            key
            for key, value in self.metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and key.startswith(MODEL_PREFIXES) and key not in known
        )
        if unexpected:
            raise CheckpointError(
                f"{self.path}: tensor {unexpected[0]!r} is not in this model (and {len(unexpected) - 1} more); "
                "the checkpoint is not of this model"
            )

    def read(self, name: str, slices: Iterable[tuple[int, int]]) -> torch.Tensor:
        """One rectangular part of a Hugging Face tensor, in the checkpoint's dtype."""
        block, slices = self._block(name), tuple(slices)
        if self._held is None or self._held[0] is not block:
            self._held = None  # before the next one is read
            self._held = (block, self.read_block(block))
        return gather(block.pieces, name, slices, self._held[1])

    def read_block(self, block: Block) -> torch.Tensor:
        """A whole parameter without the vocabulary's padding."""
        key, index = self.locate(block)
        region = (*((i, i + 1) for i in index), *((0, size) for size in block.shape))
        return self._read_region(key, region, stacked=bool(index)).reshape(block.shape)

    def read_padding(self, block: Block) -> torch.Tensor:
        """The rows of the vocabulary's padding; none for other parameters."""
        key, _ = self.locate(block)
        rows = self.metadata.state_dict_metadata[key].size[0] if block.is_vocabulary else block.shape[0]
        return self._read_region(key, ((block.shape[0], rows), (0, block.shape[1])), stacked=False)

    def _read_region(self, key: str, region: Slices, *, stacked: bool) -> torch.Tensor:
        """A rectangular part of a stored tensor, from the chunks that it overlaps."""
        stored = self.metadata.state_dict_metadata[key]
        sizes = torch.Size(stop - start for start, stop in region)
        target, covered = torch.empty(sizes, dtype=stored.properties.dtype), 0  # takes no memory until it is written to
        for index, offsets, chunk_sizes in self._chunks(key, region[0][0] if stacked else None):
            overlap = [
                (max(start, at), min(stop, at + size))
                for (start, stop), at, size in zip(region, offsets, chunk_sizes, strict=True)
            ]
            if any(start >= stop for start, stop in overlap):
                continue
            chunk = self._load_chunk(index, stored.properties.dtype, chunk_sizes)
            if chunk_sizes == sizes and offsets == torch.Size(start for start, _ in region):
                return chunk  # so that a large parameter is not held twice
            into = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(overlap, region, strict=True))
            part = tuple(slice(a - at, b - at) for (a, b), at in zip(overlap, offsets, strict=True))
            target[into].copy_(chunk[part])
            covered += target[into].numel()
            del chunk  # before the next one is read
        if covered != sizes.numel():
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
        except Exception as error:  # chunks are archives with pickles, and damaged ones raise whatever they like
            raise CheckpointError(
                f"{file}: tensor {index.fqn!r} cannot be read ({_in_a_line(error)}); copy the checkpoint again"
            ) from error
        return chunk

    def _chunks(self, key: str, layer: int | None) -> list[tuple[MetadataIndex, torch.Size, torch.Size]]:
        """The stored chunks (index, offsets, sizes) of a tensor; of a stacked one, those of one layer."""
        if key not in self._grids:
            grid: dict = {}
            for number, chunk in enumerate(self.metadata.state_dict_metadata[key].chunks):
                entry = (MetadataIndex(key, chunk.offsets, number), chunk.offsets, chunk.sizes)
                alone = layer is not None and chunk.sizes[0] == 1
                grid.setdefault(chunk.offsets[0] if alone else None, []).append(entry)
            self._grids[key] = grid
        several = self._grids[key].get(None, [])
        return several if layer is None else self._grids[key].get(layer, []) + several

    def release(self) -> None:
        """Forget the parameter that is held."""
        self._held = None


def gather(pieces: Iterable[Piece], name: str, slices: Slices, block: torch.Tensor) -> torch.Tensor:
    """Part `slices` of the Hugging Face tensor `name`, out of a block's tensor; a view where it lies in one piece."""
    target = None
    for piece in pieces:
        if piece.hf_name != name:
            continue
        overlap = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(slices, piece.hf_slices, strict=True))
        if any(start >= stop for start, stop in overlap):
            continue
        source = tuple(
            slice(a - hf + local, b - hf + local)
            for (a, b), (hf, _), (local, _) in zip(overlap, piece.hf_slices, piece.local_slices, strict=True)
        )
        if overlap == slices:
            return block[source]
        if target is None:
            target = torch.empty([stop - start for start, stop in slices], dtype=block.dtype)
        target[tuple(slice(a - s, b - s) for (a, b), (s, _) in zip(overlap, slices, strict=True))].copy_(block[source])
    assert target is not None, (name, slices)
    return target


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint's files hold, from an iteration's folder.

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
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # it is a pickle, and damaged ones raise whatever they like
        raise CheckpointError(
            f"{folder / '.metadata'}: cannot be read ({_in_a_line(error)}); copy the checkpoint again"
        ) from error


def _in_a_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
