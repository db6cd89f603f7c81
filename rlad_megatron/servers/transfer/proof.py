"""Proof that servers compute with the trainer's weights (docs/servers.md). Three checks:

- Fingerprints: did every value arrive? Exact, for each tensor of each push.
- The canary: does decoding use what arrived? Once for each start of a server. Checks of prompt log-probs have missed
  real bugs, because prefill and decode are different code paths.
- Agreement: do the two engines agree as well as at the start of the run? A statistic, after each push and each step.

Gaps are |sampler - trainer| of the log-probs of the same tokens, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from rlad_megatron.config import RunConfig
from rlad_megatron.config.agreement import FLOAT32_BOUND, HALF_PRECISION_FLOOR, engines_are_float32
from rlad_megatron.errors import WeightSyncError
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.models.perturb import STRENGTHS
from rlad_megatron.types import Sample

CANARY_SHARE = 0.5  # of the movement: how far a server may be from the trainer's perturbed log-probs
CANARY_MOVEMENT = 0.05  # nats; less could be rounding
CANARY_TARGET = 0.3  # nats; the weakest perturbation that moves log-probs so far is pushed
TENSORS_NAMED = 3


class Student(Protocol):
    """The model in training, as servers need it. Methods are collective over its ranks."""

    weights: GatheredWeights

    def perturbed(self, bit: int) -> AbstractContextManager[None]:
        """Changes every weight by a known amount until the context ends (models/perturb.py)."""

    def log_probs(self, samples: list[Sample], temperature: float | None = None) -> list[torch.Tensor]:
        """float32 [R] in nats for each sample."""


def check_fingerprints(sent: Mapping[str, int], received: object, server: str) -> None:
    """Raise WeightSyncError naming the tensors whose values are not those that the trainer sent."""
    if not isinstance(received, Mapping):
        raise WeightSyncError(f"fingerprints: {server} answered with {received!r:.100}; is it a vLLM server?")
    wrong = [name for name in sent if received.get(name) != sent[name]]
    if not wrong:
        return
    missing = [name for name in wrong if name not in received]
    more = f" and {len(wrong) - TENSORS_NAMED} more" if len(wrong) > TENSORS_NAMED else ""
    raise WeightSyncError(
        f"fingerprints: {server} received other values than the trainer sent in {', '.join(wrong[:TENSORS_NAMED])}"
        f"{more} ({len(missing)} of them did not arrive at all); the transport lost or changed bytes: try another "
        "rollout.weight_transfer, and check the memory of the server's host"
    )


@torch.no_grad()
def weakest_canary(student: Student, samples: list[Sample]) -> int:
    """The bit to flip, of STRENGTHS: the weakest that moves the samples' log-probs by CANARY_TARGET. Collective.

    If none does, the strongest. The weaker it is, the less a model in half precision amplifies its rounding errors.
    """
    true_T = torch.cat(student.log_probs(samples, temperature=1.0))
    for bit in STRENGTHS:
        with student.perturbed(bit):
            moved_T = torch.cat(student.log_probs(samples, temperature=1.0)) - true_T
        if moved_T.abs().mean() >= CANARY_TARGET:
            break
    return bit


def check_canary(
    sampler_T: torch.Tensor, perturbed_T: torch.Tensor, true_T: torch.Tensor, *, float32: bool, server: str
) -> bool:
    """Check a server that was given perturbed weights and decoded T tokens with them.

    Args:
        sampler_T: float32 [T], the server's log-probs of these tokens.
        perturbed_T, true_T: float32 [T], the trainer's, with the perturbed weights and with its own.

    Returns:
        False if the perturbation moves the trainer's log-probs too little to tell.

    Raises:
        WeightSyncError: the mean gap to `perturbed_T` is more than a share of the movement, the mean gap between
            `perturbed_T` and `true_T`; in float32, also if it is beyond FLOAT32_BOUND.
    """
    pairs = (sampler_T, perturbed_T), (sampler_T, true_T), (perturbed_T, true_T)
    near, stale, moved = ((one - other).abs().mean().item() for one, other in pairs)
    if moved < CANARY_MOVEMENT:
        return False
    bound = min(CANARY_SHARE * moved, FLOAT32_BOUND if float32 else float("inf"))
    if not near <= bound:
        used = "its old weights" if stale < near else "neither these weights nor its old ones"
        raise WeightSyncError(
            f"canary: {server} decodes with {used}: it was given weights that move the trainer's log-probs by "
            f"{moved:.3g} nats on average, and its own are {near:.3g} from there (bound {bound:.3g}) and {stale:.3g} "
            "from the unperturbed ones; the server received the weights but does not compute with all of them: restart "
            "it, and check its vLLM version and options"
        )
    return True


@dataclass
class Agreement:
    """Whether sampler and trainer agree as well as when it was first measured, at version 0 of the run."""

    factor: float
    float32: bool  # both engines compute in float32
    levels: dict[str, float] = field(default_factory=dict)  # "probe mean": nats; part of the run's state

    @classmethod
    def of(cls, config: RunConfig) -> Agreement:
        return cls(config.rollout.mismatch_factor, engines_are_float32(config))

    def check(self, where: str, found: Mapping[str, Mapping[str, float]]) -> None:
        """Compare gaps with their levels; the first ones become the levels.

        Args:
            where: "probe" or "rollouts"; each has its own levels.
            found: the gap's "mean", "p99" or "max", by what was measured ("server 0 (http://...)").

        Raises:
            WeightSyncError: in float32 any of them beyond FLOAT32_BOUND; else mean or p99 beyond `factor` times its
                level. The largest of a few rounding errors says nothing.
        """
        for statistic in next(iter(found.values())):
            if self.float32:
                allowed, origin = FLOAT32_BOUND, "the bound of float32"
            elif statistic in HALF_PRECISION_FLOOR:
                level = self.levels.setdefault(f"{where} {statistic}", max(gaps[statistic] for gaps in found.values()))
                allowed = self.factor * max(level, HALF_PRECISION_FLOOR[statistic])
                origin = f"rollout.mismatch_factor={self.factor:g} times the level at the start of the run, {level:.3g}"
            else:
                continue
            for name, gaps in found.items():
                if not gaps[statistic] <= allowed:
                    raise WeightSyncError(
                        f"agreement: {name} and the trainer disagree by {gaps[statistic]:.3g} nats ({statistic} over "
                        f"the {where}; at most {allowed:.3g}: {origin}); the weights arrived, so the two engines "
                        "compute differently: compare their precision and options, or raise rollout.mismatch_factor"
                    )
