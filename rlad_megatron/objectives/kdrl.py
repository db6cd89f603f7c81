"""KDRL: GRPO plus reverse KL to the teacher on the student's own tokens (arXiv 2506.02208).

N is the number of loss-carrying tokens; every tensor is float32 [N].
"""

from __future__ import annotations

import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.objectives.grpo import grpo
from rlad_megatron.types import TokenBatch


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

    Of the estimators k1, k2 and k3 (J. Schulman, "Approximating KL divergence", 2020) only k2 has the right gradient.
    On tokens drawn from pi_S the gradient of KL(pi_S || pi_T) is E[(log pi_S - log pi_T) * grad log pi_S], which is the
    gradient of k2, token by token. The gradient of k1 = log pi_S - log pi_T has mean 0. The gradient of
    k3 = pi_T / pi_S - 1 - log(pi_T / pi_S) is that of the forward KL(pi_T || pi_S), and it explodes where the teacher
    is far more certain than the student. The value of k2 is a biased estimate of the KL; as a metric, read the teacher
    gap, whose mean is k1.

    Like every per-token KL loss, it ignores how a token changes the KL of later tokens. The term carries no importance
    ratio, so it is slightly off-policy in the second and later updates on one rollout batch.

    Args:
        log_probs: [N] log pi_S in nats; the only input that gets a gradient.
        old_log_probs, teacher_log_probs, advantages: [N], as in `trrd`.
        kl_coefficient: weight of the KL term; 0 is GRPO.
        eps_low, eps_high: the clip range of GRPO's term is [1 - eps_low, 1 + eps_high].

    Returns:
        surrogate [N], to be maximised, and the stats of GRPO with `teacher_gap` (log pi_S - log pi_T, detached).
    """
    surrogate, stats = grpo(log_probs, old_log_probs, advantages, eps_low=eps_low, eps_high=eps_high)
    teacher_gap = log_probs - teacher_log_probs.detach()
    stats["teacher_gap"] = teacher_gap.detach()
    return surrogate - kl_coefficient * 0.5 * teacher_gap.square(), stats


def surrogate(log_probs: torch.Tensor, batch: TokenBatch, config: ObjectiveConfig):
    return kdrl(
        log_probs,
        batch.old_log_probs,
        batch.teacher_log_probs,
        batch.advantage,
        kl_coefficient=config.kl_coefficient,
        eps_low=config.eps_low,
        eps_high=config.eps_high,
    )
