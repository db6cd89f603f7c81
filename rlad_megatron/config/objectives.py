"""The objectives by name and what each needs. Imports no torch: launchers and `rlad plan` read this table too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveTraits:
    """What an objective needs, and where its function is."""

    function: str  # module:function
    needs_teacher: bool
    needs_advantage: bool
    drops_zero_advantage: bool  # advantage 0 gives no gradient, so groups with equal rewards are not trained on


def _traits(name: str, teacher: bool, advantage: bool, drops_zero: bool) -> ObjectiveTraits:
    return ObjectiveTraits(f"rlad_megatron.objectives.{name}:{name}", teacher, advantage, drops_zero)


OBJECTIVES: dict[str, ObjectiveTraits] = {
    "trrd": _traits("trrd", teacher=True, advantage=True, drops_zero=True),
    "grpo": _traits("grpo", teacher=False, advantage=True, drops_zero=True),
    # KDRL's KL term teaches on every token, whatever the rewards.
    "kdrl": _traits("kdrl", teacher=True, advantage=True, drops_zero=False),
    "on_policy_kl": _traits("on_policy_kl", teacher=True, advantage=False, drops_zero=False),
    "cross_entropy": _traits("cross_entropy", teacher=False, advantage=False, drops_zero=False),
}
