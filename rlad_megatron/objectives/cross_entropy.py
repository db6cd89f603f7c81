"""Cross-entropy on given tokens: supervised fine-tuning on gold or rejection-sampled traces."""

from __future__ import annotations

import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.types import TokenBatch


def cross_entropy(log_probs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The surrogate is the log-prob itself: -sum(weight * surrogate) is the weighted cross-entropy in nats.

    Args:
        log_probs: float32 [N] log pi_S of each trace token, in nats.

    Returns:
        surrogate [N], to be maximised, and no stats.
    """
    return log_probs, {}


def surrogate(log_probs: torch.Tensor, batch: TokenBatch, config: ObjectiveConfig):
    return cross_entropy(log_probs)
