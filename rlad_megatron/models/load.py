"""Read checkpoints slice by slice as Hugging Face tensors, and fill a model's parameters from them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from rlad_megatron import platform
from rlad_megatron.config.dtypes import DTYPES
from rlad_megatron.errors import CheckpointError
from rlad_megatron.models import registry
from rlad_megatron.models.box import Box
from rlad_megatron.models.checkpoint_files import DIGESTS, file_in
from rlad_megatron.models.megatron_folder import TRACKER, is_megatron
from rlad_megatron.models.shard_plan import ShardEntry, ShardPlan, refuse_unknown
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.models.stored import Stored, is_left_out, stored_tensors

if TYPE_CHECKING:
    from rlad_megatron.models.torch_dist import MegatronCheckpoint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
((EMBEDDING,), (HEAD,)) = registry.EMBEDDING.hf, registry.HEAD.hf
SIDE_SUFFIXES = {".json", ".model", ".txt", ".jinja"}
NOT_CARRIED = {TRACKER, "metadata.json", DIGESTS}  # of the weights


class HfCheckpoint:
    """The safetensors files of a Hugging Face folder, opened lazily; tensors are read slice by slice.

    Tensors have the names of a text model with one tensor for each expert, however they are stored (models/stored.py).

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[Path, object] = {}
        self.files: dict[str, Path]  # by tensor, as they are stored
        index, single = self.path / INDEX, self.path / SINGLE
        if index.is_file():
            self.files = _weight_map(index)
        elif single.is_file():
            self.files = dict.fromkeys(self._file(single).keys(), single)
        else:
            raise CheckpointError(
                f"{self.path}: neither {SINGLE} nor {INDEX} found; give a Hugging Face or a Megatron checkpoint"
            )

        self.stored = stored_tensors(self.files, self.stored_shape)

    @property
    def left_out(self) -> list[str]:
        """The stored tensors that the text model lacks."""
        return [name for name in self.files if is_left_out(name)]

    def file_names(self) -> list[str]:
        """The files that a digest is kept of."""
        names = {file.name for file in self.files.values()}
        return [*names, INDEX] if (self.path / INDEX).is_file() else [*names]

    def _file(self, file: Path):
        if file not in self._open:
            if not file.is_file():
                raise CheckpointError(f"{file}: not found, though {INDEX} lists it; copy the checkpoint again")
            # Imported here: a model that is not loaded from files needs no safetensors (benchmarks/gpu_check.py).
            from safetensors import SafetensorError, safe_open

            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: truncated or damaged ({error}); copy the checkpoint again") from error
        return self._open[file]

    def _place(self, name: str) -> Stored:
        if name not in self.stored:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing; the checkpoint is not of this model")
        return self.stored[name]

    def _file_of(self, name: str) -> Path:
        return self.files[self._place(name).name]

    def _stored_slice(self, name: str):
        file = self._file(self.files[name])
        from safetensors import SafetensorError

        try:
            return file.get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.files[name]}: tensor {name!r} is not in it, though {INDEX} says so; copy the checkpoint again"
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._place(name)
        return place.shape(self.stored_shape(place.name))

    def dtype(self, name: str) -> torch.dtype:
        return self.stored_dtype(self._place(name).name)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor by its name in the files."""
        return tuple(self._stored_slice(name).get_shape())

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of a tensor by its name in the files."""
        found = self._stored_slice(name).get_dtype()
        if found not in platform.DTYPES:
            raise CheckpointError(
                f"{self.files[name]}: tensor {name!r} has dtype {found}; "
                f"only {', '.join(dtype.safetensors for dtype in DTYPES)} are covered, so dequantise the model first"
            )
        return platform.DTYPES[found]

    def release(self) -> None:
        """Close the files. They are memory-mapped, and pages that were read stay in memory until then."""
        self._open.clear()

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A part of a tensor, in the file's dtype."""
        place = self._place(name)
        return self._stored_slice(place.name)[place.slices(box).slices].view(box.sizes)

    def read_stored(self, name: str) -> torch.Tensor:
        """A whole tensor as it is stored, by its name in the files."""
        return self._stored_slice(name)[:]

    def check(self, plan: ShardPlan) -> None:
        """Raise CheckpointError if a file cannot be opened, or a tensor is missing, unknown or of a wrong shape."""
        for file in sorted(set(self.files.values())):
            self._file(file)
        for name, expected in plan.hf_shapes.items():
            shape = self.shape(name)
            if shape != expected:
                raise CheckpointError(
                    f"{self._file_of(name)}: tensor {name!r} has shape {shape}, config.json asks for {expected}; "
                    "the two are not of one model"
                )
        # Some exporters write the head of a tied model as well.
        if HEAD in self.stored and HEAD not in plan.hf_shapes and not self._same_tensors(HEAD, EMBEDDING):
            raise CheckpointError(
                f"{self._file_of(HEAD)}: tensor {HEAD!r} differs from {EMBEDDING!r}, though config.json ties "
                "them; set tie_word_embeddings to false there if both are meant"
            )
        unknown = self.stored.keys() - plan.hf_shapes.keys() - {HEAD}
        refuse_unknown({name: self._file_of(name) for name in unknown})

    def _same_tensors(self, one: str, other: str) -> bool:
        """Whether two matrices are equal, reading some rows at a time."""
        shape = self.shape(one)
        if shape != self.shape(other) or self.dtype(one) != self.dtype(other):
            return False
        parts = [Box(((start, min(start + 8192, shape[0])), (0, shape[1]))) for start in range(0, shape[0], 8192)]
        same = all(torch.equal(self.read(one, part), self.read(other, part)) for part in parts)
        self.release()
        return same


def print_left_out(checkpoint: Checkpoint) -> None:
    """Print one line if the folder has weights that the text model lacks."""
    names = checkpoint.left_out if isinstance(checkpoint, HfCheckpoint) else []
    if names:
        parts = sorted({".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in names})
        print(
            f"model {checkpoint.path}: {len(names)} tensors of {' and '.join(parts)} are left out; rlad trains the "
            "text model",
            file=sys.stderr,
            flush=True,
        )


Checkpoint: TypeAlias = "HfCheckpoint | MegatronCheckpoint"  # a model on disk, seen as Hugging Face tensors


def open_checkpoint(path: str | Path, spec: ModelSpec) -> Checkpoint:
    """The weights in a folder, in either format.

    Raises:
        CheckpointError: files are missing, truncated or damaged.
    """
    if not is_megatron(path):
        return HfCheckpoint(path)
    # torch.distributed.checkpoint takes 0.7 s to import, and most starts read no such checkpoint.
    from rlad_megatron.models.torch_dist import MegatronCheckpoint

    return MegatronCheckpoint(path, spec)


def _weight_map(index: Path) -> dict[str, Path]:
    """Tensor -> file, from the index of a Hugging Face folder."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: file_in(index.parent, file, index) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: has no readable weight_map ({error}); copy the checkpoint again") from error


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether it is one of Transformer Engine's FP8 tensors: a subclass that holds data and scales."""
    return type(parameter) not in (torch.Tensor, torch.nn.Parameter)


def stored_bytes(parameter: torch.Tensor) -> int:
    """Bytes that a parameter takes. In FP8 one for each value: scales and transposed copies are not counted."""
    return parameter.numel() * (1 if is_quantized(parameter) else parameter.element_size())


@torch.no_grad()
def load_weights(parameters: Mapping[str, torch.Tensor], entries: Iterable[ShardEntry], checkpoint: Checkpoint) -> None:
    """Fill this rank's parameters, reading only its own slices. Vocabulary padding becomes 0."""
    entries = list(entries)
    assert set(parameters) == {entry.name for entry in entries}, set(parameters) ^ {entry.name for entry in entries}
    for entry in entries:
        parameter = parameters[entry.name]
        assert tuple(parameter.shape) == entry.shape, (entry.name, parameter.shape, entry.shape)
        target = parameter
        if is_quantized(parameter):  # its scales cover all of it, so it cannot be filled slice by slice
            target = torch.empty(entry.shape, dtype=parameter.dtype, device=parameter.device)
        target.zero_()
        for piece in entry.pieces:
            target[piece.local_slices.slices].copy_(checkpoint.read(piece.hf_name, piece.hf_slices))
        if target is not parameter:
            parameter.copy_(target)
            if hasattr(parameter, "get_high_precision_init_val"):
                # The optimizer starts its float32 copy from this; so far it holds the random initial weights.
                parameter.get_high_precision_init_val().copy_(target)
    checkpoint.release()


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copy config, tokenizer and generation files to an export."""
    for file in Path(source).iterdir():
        of_weights = file.name.endswith(".index.json") or file.name in NOT_CARRIED
        if file.suffix in SIDE_SUFFIXES and not of_weights and file.is_file():
            shutil.copy2(file, Path(target) / file.name)
