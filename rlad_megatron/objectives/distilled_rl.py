"""Distilled RL: the teacher weighs the tokens of good responses (arXiv 2607.17247).

Equations and the paper's settings: README of the authors' repository, github.com/597358816/Distilled-RL.
N is the number of loss-carrying tokens; every tensor is float32 [N].
"""

from __future__ import annotations

import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.objectives.grpo import grpo
from rlad_megatron.types import TokenBatch


def log_preference(
    old_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, *, teacher_clamp: float
) -> torch.Tensor:
    """log rho = clamp(log pi_T - log pi_old, -c, c): how much likelier a token is to the teacher, detached.

    Its mean over a response is `response_mean` of `distilled_rl`.
    """
    return (teacher_log_probs - old_log_probs).detach().clamp(-teacher_clamp, teacher_clamp)


def distilled_rl(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    response_mean: torch.Tensor,
    *,
    teacher_clamp: float,
    eps_low: float,
    eps_high: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """GRPO's surrogate with the advantage w * A; w = exp(log rho - mean of log rho over the response) where A > 0,
    else 1.

    The mean of log w over a response is 0: the teacher moves weight from token to token. It never says which tokens of
    a bad response are to blame.

    Args:
        log_probs: [N] log pi_S in nats; the only input that gets a gradient.
        old_log_probs, teacher_log_probs, advantages: [N], as in `trrd`.
        response_mean: [N] of `log_preference`, over the response to which a token belongs.
        teacher_clamp: c, in nats; the paper's eps_rho is exp(c).
        eps_low, eps_high: the clip range of pi_S / pi_old is [1 - eps_low, 1 + eps_high].

    Returns:
        surrogate [N], to be maximised, and the stats of GRPO with `teacher_gap` (log pi_S - log pi_T, detached) and
        `clamped` (bool: the clamp of log rho binds).
    """
    log_rho = log_preference(old_log_probs, teacher_log_probs, teacher_clamp=teacher_clamp)
    weight = torch.where(advantages > 0, (log_rho - response_mean.detach()).exp(), 1.0)
    surrogate, stats = grpo(log_probs, old_log_probs, weight * advantages, eps_low=eps_low, eps_high=eps_high)
    stats["teacher_gap"] = (log_probs - teacher_log_probs).detach()
    stats["clamped"] = (teacher_log_probs - old_log_probs).detach().abs() > teacher_clamp
    return surrogate, stats


def averaged(batch: TokenBatch, config: ObjectiveConfig) -> torch.Tensor:
    """float32 [N]: what `response_mean` is the mean of."""
    return log_preference(batch.old_log_probs, batch.teacher_log_probs, teacher_clamp=config.teacher_clamp)


def surrogate(log_probs: torch.Tensor, batch: TokenBatch, config: ObjectiveConfig):
    return distilled_rl(
        log_probs,
        batch.old_log_probs,
        batch.teacher_log_probs,
        batch.advantage,
        batch.response_mean,
        teacher_clamp=config.teacher_clamp,
        eps_low=config.eps_low,
        eps_high=config.eps_high,
    )
