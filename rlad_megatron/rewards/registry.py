"""Rewards by name. A reward is a pure function of a prompt and the text of a response."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from rlad_megatron.errors import ConfigError
from rlad_megatron.types import Prompt


@dataclass(frozen=True)
class RewardResult:
    """What one response is worth.

    Example: RewardResult(score=3.0, solved=True, parts={"format": 1.0, "answer": 2.0})
    """

    score: float  # what training maximises, up to LARGEST either way
    solved: bool  # what accuracy counts
    parts: dict[str, float] = field(default_factory=dict)  # each logged as reward/<part>; not "mean" or "solved"


Reward = Callable[[Prompt, str], RewardResult]

LARGEST = 1e12  # of a score or part: differences of 1e-4 between scores are still exact
METRICS = ("mean", "solved")  # of all rewards: reward/mean, reward/solved


def what_is_wrong(result: object) -> str | None:
    """What a reward must not have returned, in words; None if it is right."""
    if not isinstance(result, RewardResult):
        return "not a RewardResult"
    if not _is_number(result.score):
        return f"score must be a number from -{LARGEST:g} to {LARGEST:g}"
    if type(result.solved).__name__ not in ("bool", "bool_"):  # NumPy's, which is not imported here
        return "solved must be True or False"
    if not isinstance(result.parts, dict):
        return "parts must be a dict of names and numbers"
    for name, value in result.parts.items():
        if not isinstance(name, str) or name in METRICS:
            return f"a part must not be called {name!r:.50}"
        if not _is_number(value):
            return f"part {name!r:.50} must be a number from -{LARGEST:g} to {LARGEST:g}"
    return None


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, Real)  # NumPy's too
    return is_real and bool(-LARGEST <= value <= LARGEST)  # no NaN


# To add a reward, write a function and add a line here. A reward is imported when a run uses it, so a run does not
# load another task's libraries.
REWARDS = {
    "knights_and_knaves": "rlad_megatron.rewards.knights_and_knaves:reward",
    "math": "rlad_megatron.rewards.math:reward",
    "math_lenient": "rlad_megatron.rewards.math:lenient_reward",
}


def load_reward(name: str) -> Reward:
    """The reward called `name`, or the function at "module:function".

    Raises ConfigError with the names that exist, or with the part of "module:function" that does not.
    """
    field = f"data.reward={name!r}"
    if name not in REWARDS and ":" not in name:
        raise ConfigError(f"{field} is unknown; use one of {', '.join(sorted(REWARDS))}, or 'module:function'")
    module_name, _, function_name = REWARDS.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's
        raise ConfigError(
            f"{field}: cannot import {module_name!r} ({type(error).__name__}: {error}); write 'module:function' with a "
            "module on PYTHONPATH that can be imported"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(
            f"{field}: module {module_name!r} has no function {function_name!r}; define "
            f"{function_name or 'it'}(prompt, text) -> RewardResult there"
        )
    return function
