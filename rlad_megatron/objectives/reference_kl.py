"""The KL to a frozen reference policy, on the student's own tokens (GRPO, arXiv 2402.03300, eq. 4)."""

from __future__ import annotations

import torch

from rlad_megatron.objectives.grpo import MAX_LOG_RATIO


def k3(log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """pi_ref / pi_S - log(pi_ref / pi_S) - 1 of each token, never negative.

    On tokens drawn from pi_S its mean is KL(pi_S || pi_ref), without bias and with less variance than
    log(pi_S / pi_ref). Its gradient, (1 - pi_ref / pi_S) * grad log pi_S, is that of the other direction,
    KL(pi_ref || pi_S); near pi_ref the two agree. A token whose ratio exceeds exp(MAX_LOG_RATIO) has no gradient.

    Args:
        log_probs: float32 [N] log pi_S in nats; the only input that gets a gradient.
        reference_log_probs: float32 [N] log pi_ref.

    Returns:
        float32 [N] in nats.
    """
    log_ratio = (reference_log_probs.detach() - log_probs).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio
