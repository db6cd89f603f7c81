"""Pure on-policy distillation: the sampled-token reverse KL as a per-token advantage.

N is the number of loss-carrying tokens; every tensor is float32 [N].
"""

from __future__ import annotations

import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.types import TokenBatch


def on_policy_kl(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """pi_S / pi_old * A with A = -(log pi_S - log pi_T), detached. It uses no reward.

    The gradient on tokens of pi_old is the importance-weighted policy gradient of -KL(pi_S || pi_T), per token.
    The ratio needs no clip: the advantage changes sign as the student passes the teacher, which bounds the step.

    Args:
        log_probs: [N] log pi_S in nats; the only input that gets a gradient.
        old_log_probs, teacher_log_probs: [N].

    Returns:
        surrogate [N], to be maximised, and the stats `ratio` and `teacher_gap` (log pi_S - log pi_T), detached.
    """
    teacher_gap = log_probs.detach() - teacher_log_probs.detach()
    ratio = (log_probs - old_log_probs.detach()).exp()
    return ratio * -teacher_gap, {"ratio": ratio.detach(), "teacher_gap": teacher_gap}


def surrogate(log_probs: torch.Tensor, batch: TokenBatch, config: ObjectiveConfig):
    return on_policy_kl(log_probs, batch.old_log_probs, batch.teacher_log_probs)
