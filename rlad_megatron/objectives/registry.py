"""The objectives by name: one signature for all, so that the trainer knows none of them.

To add one: a file with the pure function, an adapter and a line in `OBJECTIVES` here, its name in `config.OBJECTIVES`,
and a test (docs/add-an-objective.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rlad_megatron.objectives.cross_entropy import cross_entropy
from rlad_megatron.objectives.grpo import grpo
from rlad_megatron.objectives.kdrl import kdrl
from rlad_megatron.objectives.on_policy_kl import on_policy_kl
from rlad_megatron.objectives.trrd import trrd

Batch = dict[str, torch.Tensor]
Surrogate = tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Objective:
    """A per-token objective and what it must be given.

    `objective(log_probs, batch, config) -> (surrogate, stats)`: log_probs is float32 [N] with gradient; batch holds
    float32 [N] under "advantage" and "teacher_log_probs" as the flags say, and under "old_log_probs" where pi_old is
    not the student of this very forward pass; config is any object with the fields of `config.ObjectiveConfig`.
    The surrogate [N] is to be maximised: loss = -sum(weight * surrogate). Stats are detached [N] tensors.
    """

    function: Callable[[torch.Tensor, Batch, Any], Surrogate]
    needs_teacher: bool
    needs_advantage: bool
    drops_zero_advantage: bool  # advantage 0 means no gradient: groups with equal rewards need no forward pass

    def __call__(self, log_probs: torch.Tensor, batch: Batch, config: Any) -> Surrogate:
        return self.function(log_probs, batch, config)


def _old(log_probs: torch.Tensor, batch: Batch) -> torch.Tensor:
    # One optimizer update per rollout batch: pi_old is the student of this forward, so no extra pass was made for it.
    return batch["old_log_probs"] if "old_log_probs" in batch else log_probs.detach()


def _trrd(log_probs: torch.Tensor, batch: Batch, config: Any) -> Surrogate:
    return trrd(
        log_probs,
        _old(log_probs, batch),
        batch["teacher_log_probs"],
        batch["advantage"],
        alpha=config.alpha,
        teacher_clamp=config.teacher_clamp,
        eps_low=config.eps_low,
        eps_high=config.eps_high,
    )


def _grpo(log_probs: torch.Tensor, batch: Batch, config: Any) -> Surrogate:
    old_log_probs = _old(log_probs, batch)
    return grpo(log_probs, old_log_probs, batch["advantage"], eps_low=config.eps_low, eps_high=config.eps_high)


def _kdrl(log_probs: torch.Tensor, batch: Batch, config: Any) -> Surrogate:
    return kdrl(
        log_probs,
        _old(log_probs, batch),
        batch["teacher_log_probs"],
        batch["advantage"],
        kl_coefficient=config.kl_coefficient,
        eps_low=config.eps_low,
        eps_high=config.eps_high,
    )


def _on_policy_kl(log_probs: torch.Tensor, batch: Batch, config: Any) -> Surrogate:
    return on_policy_kl(log_probs, _old(log_probs, batch), batch["teacher_log_probs"])


def _cross_entropy(log_probs: torch.Tensor, batch: Batch, config: Any) -> Surrogate:
    return cross_entropy(log_probs)


OBJECTIVES: dict[str, Objective] = {
    "trrd": Objective(_trrd, needs_teacher=True, needs_advantage=True, drops_zero_advantage=True),
    "grpo": Objective(_grpo, needs_teacher=False, needs_advantage=True, drops_zero_advantage=True),
    # KDRL's KL term teaches on every token, whatever the rewards.
    "kdrl": Objective(_kdrl, needs_teacher=True, needs_advantage=True, drops_zero_advantage=False),
    "on_policy_kl": Objective(_on_policy_kl, needs_teacher=True, needs_advantage=False, drops_zero_advantage=False),
    "cross_entropy": Objective(_cross_entropy, needs_teacher=False, needs_advantage=False, drops_zero_advantage=False),
}


def objective_for(name: str) -> Objective:
    """The objective of this name; ValueError lists the names that exist."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is unknown; choose one of: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
