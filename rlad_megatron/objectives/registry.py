"""From an objective's name to its function. Names and flags are in config/objectives.py, which needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from rlad_megatron.config import OBJECTIVES, ObjectiveConfig
from rlad_megatron.types import TokenBatch

TokenStats = dict[str, torch.Tensor]
# surrogate(log_probs, batch, config) -> (surrogate, stats). log_probs: float32 [N] log pi_S, the only input that gets a
# gradient. batch: with pi_old, and with what the objective's traits ask for. surrogate: [N], to be maximised; the loss
# is -sum(weight * surrogate). stats: detached [N] tensors whose names are in STAT_METRICS.
Surrogate = Callable[[torch.Tensor, TokenBatch, ObjectiveConfig], tuple[torch.Tensor, TokenStats]]

# The metric that reports the mean of a statistic over all tokens of an update.
STAT_METRICS = {
    "clipped": "ratio/clip_fraction",
    "ratio": "ratio/mean",
    "teacher_gap": "trrd/teacher_gap_mean",
    "clamped": "trrd/clamp_fraction",
    "entropy": "entropy/mean",
    "reference_kl": "reference/kl_mean",
}


def surrogate_for(name: str) -> Surrogate:
    """`surrogate` of `rlad_megatron/objectives/NAME.py`. Raises ValueError listing the names that exist."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is unknown; choose one of: {', '.join(OBJECTIVES)}")
    return importlib.import_module(f"rlad_megatron.objectives.{name}").surrogate


def averaged_for(name: str) -> Callable[[TokenBatch, ObjectiveConfig], torch.Tensor]:
    """`averaged` of `rlad_megatron/objectives/NAME.py`, for an objective that `averages_over_responses`.

    averaged(batch, config) -> float32 [N], from a batch with pi_old.
    """
    return importlib.import_module(f"rlad_megatron.objectives.{name}").averaged
