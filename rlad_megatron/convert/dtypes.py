"""What the weights of a target may be stored in."""

from __future__ import annotations

import torch

from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.load import Checkpoint

DTYPES = {"keep": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def check_range(tensor: torch.Tensor, name: str, source: Checkpoint) -> None:
    """Raise CheckpointError where a converted tensor lost values of the source, because float16 ends at 65,504."""
    if tensor.dtype != torch.float16 or source.dtype(name) == torch.float16:
        return
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # takes no memory, as isfinite of the whole would
        raise CheckpointError(
            f"{source.path}: tensor {name!r} has values that float16 cannot hold; choose --dtype bfloat16 or float32"
        )
