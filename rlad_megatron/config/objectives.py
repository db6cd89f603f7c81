"""The objectives by name, and what each needs.

A new objective is one line here and one file, `rlad_megatron/objectives/NAME.py` (docs/add-an-objective.md).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveTraits:
    """What an objective needs, and what follows from its formula."""

    generates: bool = True  # trains on responses that servers sample; otherwise it fine-tunes on traces
    needs_teacher: bool = False  # teacher log-probs of every token
    needs_advantage: bool = False  # rewards relative to a group of responses
    takes_sequence_ratio: bool = False  # pi_old enters by pi_S / pi_old alone, so a response's ratio can take its place
    averages_over_responses: bool = False  # needs the mean over each response of `averaged` in its file
    drops_zero_advantage: bool = False  # advantage 0 means no gradient: groups with equal rewards are not trained on

    def __post_init__(self) -> None:
        # Both are `TokenBatch.response_mean`.
        assert not (self.takes_sequence_ratio and self.averages_over_responses)


OBJECTIVES = {
    "trrd": ObjectiveTraits(needs_teacher=True, needs_advantage=True, drops_zero_advantage=True),
    "grpo": ObjectiveTraits(needs_advantage=True, takes_sequence_ratio=True, drops_zero_advantage=True),
    # Its KL term trains on every token.
    "kdrl": ObjectiveTraits(needs_teacher=True, needs_advantage=True, takes_sequence_ratio=True),
    "distilled_rl": ObjectiveTraits(
        needs_teacher=True, needs_advantage=True, averages_over_responses=True, drops_zero_advantage=True
    ),
    "on_policy_kl": ObjectiveTraits(needs_teacher=True),
    "cross_entropy": ObjectiveTraits(generates=False),
}
