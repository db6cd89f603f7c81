"""Write a Hugging Face folder from a stream of whole tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from rlad_megatron.models.load import copy_side_files
from rlad_megatron.models.safetensors_files import MAX_SHARD_BYTES, SafetensorsFiles


def export_hf(
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    like: str | Path,
    target: Path,
    dtype: torch.dtype,
    write: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `tensors`, of these shapes, in `dtype` as safetensors, with the config and tokenizer files of `like`.

    Iterating may be collective, so every rank calls this, one of them with `write=True`. The folder gets its name when
    it is complete, and replaces an earlier one.
    """
    if not write:
        for _ in tensors:
            pass
        return
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = SafetensorsFiles(temporary, {name: (shape, dtype) for name, shape in shapes.items()}, max_shard_bytes)
    files.create()
    missing = set(shapes)
    for name, tensor in tensors:
        files.write(name, tensor)
        missing.remove(name)
    assert not missing, missing
    copy_side_files(like, temporary)
    set_dtype(temporary / "config.json", dtype)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Name the stored dtype in a config.json."""
    config = json.loads(config_file.read_text())
    config.pop("torch_dtype", None)  # the older name of the same field
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
