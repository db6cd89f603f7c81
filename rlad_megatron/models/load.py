"""Hugging Face checkpoints on disk: reading the slices a rank needs, and writing them back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.shard_plan import ShardEntry, ShardPlan

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HfCheckpoint:
    """The safetensors files of a Hugging Face folder, opened lazily; tensors are read slice by slice.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, named with its remedy.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[str, object] = {}
        index = self.path / INDEX
        if index.is_file():
            self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (self.path / SINGLE).is_file():
            self.files = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        else:
            raise CheckpointError(f"{self.path}: neither {SINGLE} nor {INDEX} found; give a folder with safetensors")

    def _file(self, name: str):
        if name not in self._open:
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: not found, though {INDEX} lists it; copy the checkpoint again")
            try:
                self._open[name] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{file}: truncated or damaged ({error}); copy the checkpoint again") from error
        return self._open[name]

    def _slice(self, name: str):
        if name not in self.files:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing; the checkpoint is not of this model")
        return self._file(self.files[name]).get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, slices: Iterable[tuple[int, int]]) -> torch.Tensor:
        """One rectangular part of a tensor, in the file's dtype."""
        return self._slice(name)[tuple(slice(start, stop) for start, stop in slices)]

    def check(self, plan: ShardPlan) -> None:
        """Raise CheckpointError where a file cannot be opened or a tensor is missing, of a wrong shape, or too many."""
        for file in sorted(set(self.files.values())):
            self._file(file)
        for name, expected in plan.hf_shapes.items():
            if self.shape(name) != expected:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has shape {self.shape(name)}, "
                    f"config.json asks for {expected}; the two are not of one model"
                )
        # Some exporters write a tied head although config.json says that it is the embedding.
        unexpected = sorted(set(self.files) - set(plan.hf_shapes) - {"lm_head.weight"})
        if unexpected:
            raise CheckpointError(
                f"{self.path}: tensor {unexpected[0]!r} is not in this model (and {len(unexpected) - 1} more); "
                "the checkpoint is not of this model"
            )


@torch.no_grad()
def load_weights(
    parameters: Mapping[str, torch.Tensor], entries: Iterable[ShardEntry], checkpoint: HfCheckpoint
) -> None:
    """Fill this rank's parameters from the files, reading only its own slices. Vocabulary padding becomes 0."""
    entries = list(entries)
    if set(parameters) != {entry.name for entry in entries}:
        raise AssertionError(f"plan and model differ: {set(parameters) ^ {entry.name for entry in entries}}")
    for entry in entries:
        parameter = parameters[entry.name]
        assert tuple(parameter.shape) == entry.shape, (entry.name, parameter.shape, entry.shape)
        parameter.zero_()
        for piece in entry.pieces:
            local = parameter[tuple(slice(start, stop) for start, stop in piece.local_slices)]
            local.copy_(checkpoint.read(piece.hf_name, piece.hf_slices))


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Carry config, tokenizer and generation files along to an export."""
    for file in Path(source).iterdir():
        if file.is_file() and file.suffix in {".json", ".model", ".txt", ".jinja"} and file.name != INDEX:
            shutil.copy2(file, Path(target) / file.name)
