"""RLAD's trust-region ratio distillation (TRRD, arXiv 2602.22495v2, eq. 3 with the clamp of appendix B).

N is the number of loss-carrying tokens; every tensor is float32 [N].
"""

from __future__ import annotations

import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.objectives.grpo import clipped_surrogate
from rlad_megatron.types import TokenBatch


def trrd(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    alpha: float,
    teacher_clamp: float,
    eps_low: float,
    eps_high: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """min(r * A, clip(r, 1 - eps_low, 1 + eps_high) * A) with the ratio of eq. 3:

        log r = alpha * (log pi_S - log pi_old) + (1 - alpha) * clamp(log pi_S - log pi_T, -c, c)

    Args:
        log_probs: [N] log pi_S in nats; the only input that gets a gradient.
        old_log_probs: [N] log pi_old.
        teacher_log_probs: [N] log pi_T.
        advantages: [N] the response's group-relative advantage at each of its tokens.
        alpha: 1 is GRPO, bit for bit in values and gradients; at 0 only the teacher anchors the ratio.
        teacher_clamp: c, in nats. Where it binds, the teacher part has no gradient.
        eps_low, eps_high: the clip range is [1 - eps_low, 1 + eps_high].

    Returns:
        surrogate [N], to be maximised, and stats, all detached: `ratio`, `clipped` (bool: the clip branch is active),
        `teacher_gap` (log pi_S - log pi_T, before the clamp) and `clamped` (bool: |teacher_gap| > c).
    """
    teacher_gap = log_probs - teacher_log_probs.detach()
    log_ratio = log_probs - old_log_probs.detach()
    # Alpha 1 skips the teacher term instead of multiplying it by 0: 0 * NaN is NaN, so a broken teacher would affect a
    # run that does not use it. Without the extra node the graph is GRPO's own.
    if alpha != 1.0:
        log_ratio = alpha * log_ratio + (1.0 - alpha) * teacher_gap.clamp(-teacher_clamp, teacher_clamp)
    surrogate, stats = clipped_surrogate(log_ratio, advantages, eps_low=eps_low, eps_high=eps_high)
    stats["teacher_gap"] = teacher_gap.detach()
    stats["clamped"] = stats["teacher_gap"].abs() > teacher_clamp
    return surrogate, stats


def surrogate(log_probs: torch.Tensor, batch: TokenBatch, config: ObjectiveConfig):
    return trrd(
        log_probs,
        batch.old_log_probs,
        batch.teacher_log_probs,
        batch.advantage,
        alpha=config.alpha,
        teacher_clamp=config.teacher_clamp,
        eps_low=config.eps_low,
        eps_high=config.eps_high,
    )
