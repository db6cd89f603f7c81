"""RLAD's trust-region ratio distillation (TRRD, arXiv 2602.22495v2, eq. 3 with the clamp of appendix B).

N is the number of loss-carrying tokens; every tensor is float32 [N].
"""

from __future__ import annotations

import torch

from rlad_megatron.objectives.grpo import clipped_surrogate


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
        alpha: 1 is GRPO, bit for bit in values and gradients; towards 0 the teacher anchors the ratio alone.
        teacher_clamp: c, in nats. Where it binds, the teacher part has no gradient.
        eps_low, eps_high: the clip range is [1 - eps_low, 1 + eps_high].

    Returns:
        surrogate [N], to be maximised, and stats, all detached: `ratio`, `clipped` (bool: the clip branch is active),
        `teacher_gap` (log pi_S - log pi_T, before the clamp) and `clamped` (bool: |teacher_gap| > c).
    """
    teacher_gap = log_probs - teacher_log_probs.detach()
    log_ratio = log_probs - old_log_probs.detach()
    # At alpha = 1 the teacher term is left out rather than multiplied by 0: 0 * NaN is NaN, so a broken teacher
    # would reach a run that does not use it, and without the extra node the graph is GRPO's own.
    if alpha != 1.0:
        log_ratio = alpha * log_ratio + (1.0 - alpha) * teacher_gap.clamp(-teacher_clamp, teacher_clamp)
    surrogate, stats = clipped_surrogate(log_ratio, advantages, eps_low=eps_low, eps_high=eps_high)
    stats["teacher_gap"] = teacher_gap.detach()
    stats["clamped"] = stats["teacher_gap"].abs() > teacher_clamp
    return surrogate, stats
