"""GRPO's clipped surrogate (arXiv 2402.03300; clip range asymmetric as in DAPO, arXiv 2503.14476).

N is the number of loss-carrying tokens; every tensor is float32 [N].
"""

from __future__ import annotations

import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.types import TokenBatch

# exp(88.8) overflows float32. An infinite ratio would make the gradient of a token that the clip cuts 0 * inf = NaN.
MAX_LOG_RATIO = 80.0


def clipped_surrogate(
    log_ratio: torch.Tensor, advantages: torch.Tensor, *, eps_low: float, eps_high: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's min(r * A, clip(r, 1 - eps_low, 1 + eps_high) * A) with r = exp(min(log_ratio, MAX_LOG_RATIO)).

    A token beyond MAX_LOG_RATIO has no gradient.

    Returns the surrogate [N], to be maximised, and the stats `ratio` (float32 [N], detached) and `clipped` (bool [N]:
    the clip branch is smaller, so the token has no gradient).
    """
    advantages = advantages.detach()
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - eps_low, 1.0 + eps_high) * advantages
    stats = {"ratio": ratio.detach(), "clipped": (clipped < unclipped).detach()}
    return torch.minimum(unclipped, clipped), stats


def grpo(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    eps_low: float,
    eps_high: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate with the ratio pi_S / pi_old, without a KL term (beta = 0).

    Args:
        log_probs: [N] log pi_S in nats; the only input that gets a gradient.
        old_log_probs: [N] log pi_old.
        advantages: [N] the response's group-relative advantage at each of its tokens.
        eps_low, eps_high: the clip range is [1 - eps_low, 1 + eps_high].

    Returns:
        surrogate [N], to be maximised, and the stats of `clipped_surrogate`.
    """
    return clipped_surrogate(log_probs - old_log_probs.detach(), advantages, eps_low=eps_low, eps_high=eps_high)


def surrogate(log_probs: torch.Tensor, batch: TokenBatch, config: ObjectiveConfig):
    return grpo(log_probs, batch.old_log_probs, batch.advantage, eps_low=config.eps_low, eps_high=config.eps_high)
