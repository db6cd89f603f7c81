"""KDRL: GRPO plus reverse KL to the teacher on the student's own tokens (arXiv 2506.02208).

N is the number of loss-carrying tokens; every tensor is float32 [N].
"""

from __future__ import annotations

import torch

from rlad_megatron.objectives.grpo import grpo


def kdrl(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    kl_coefficient: float,
    eps_low: float,
    eps_high: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """GRPO's surrogate minus kl_coefficient * k2, with k2 = (log pi_S - log pi_T)^2 / 2.

    Why k2 of the estimators k1, k2, k3 (names: J. Schulman, "Approximating KL divergence", 2020): it is its gradient
    that trains. On tokens drawn from pi_S the gradient of KL(pi_S || pi_T) is
    E[(log pi_S - log pi_T) * grad log pi_S], and that is the gradient of k2, token by token. k1 = log pi_S - log pi_T
    has a gradient of mean 0; k3 = pi_T / pi_S - 1 - log(pi_T / pi_S) has that of the forward KL(pi_T || pi_S), and
    explodes where the teacher is far more certain than the student. k2's own value is a biased estimate of the KL:
    read the teacher gap, whose mean is k1, as the metric.

    Like every per-token KL loss it leaves out how a token changes the KL of later ones. Updates after the first on
    one rollout batch are slightly off-policy in this term, which carries no importance ratio.

    Args:
        log_probs: [N] log pi_S in nats; the only input that gets a gradient.
        old_log_probs, teacher_log_probs, advantages: [N], as in `trrd`.
        kl_coefficient: weight of the KL term; 0 is GRPO.
        eps_low, eps_high: the clip range is [1 - eps_low, 1 + eps_high]; the KL term is not clipped.

    Returns:
        surrogate [N], to be maximised, and the stats of GRPO and `teacher_gap` (log pi_S - log pi_T, detached).
    """
    surrogate, stats = grpo(log_probs, old_log_probs, advantages, eps_low=eps_low, eps_high=eps_high)
    teacher_gap = log_probs - teacher_log_probs.detach()
    stats["teacher_gap"] = teacher_gap.detach()
    return surrogate - kl_coefficient * 0.5 * teacher_gap.square(), stats
