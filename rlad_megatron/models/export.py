"""Write a Hugging Face folder from a stream of whole tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from rlad_megatron.models.load import INDEX, SINGLE, copy_side_files

MAX_SHARD_BYTES = 5 * 10**9


def export_hf(
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    like: str | Path,
    target: Path,
    dtype: torch.dtype,
    write: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `tensors` in `dtype` as safetensors beside the config and tokenizer files of the folder `like`.

    Iterating may be collective, so every rank calls this and one has `write=True`. The folder appears under its
    name only when it is complete; one that stood there before is replaced.
    """
    if not write:
        for _ in tensors:
            pass
        return
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        if pending:
            save_file(pending, temporary / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if sum(t.numel() * t.element_size() for t in pending.values()) + size > max_shard_bytes:
            flush()
        pending[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        total += size
    flush()

    weight_map = {}
    for number, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(temporary / f"shard-{number}", temporary / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    copy_side_files(like, temporary)
    config = json.loads((temporary / "config.json").read_text())
    config.pop("torch_dtype", None)  # the older name of the same field
    config["dtype"] = str(dtype).removeprefix("torch.")
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
