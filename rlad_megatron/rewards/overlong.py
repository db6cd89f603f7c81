"""DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

from rlad_megatron.types import EVALUATION, Group

PART = "overlong"  # its name among a reward's parts


def soft_overlong_punishment(length: int, longest: int, buffer: int) -> float:
    """What is added to the reward of a response: 0 up to `buffer` tokens before `longest`, then down to -1.

    A graded penalty tells a response that is nearly too long from one that is far too long.
    """
    return -min(max(length - (longest - buffer), 0) / buffer, 1.0)


def punish_overlong(groups: list[Group], longest: int, buffer: int) -> None:
    """Add the punishment to the rewards of training rollouts, in place, and to their parts. Evaluation stays as it is.

    longest, buffer: in tokens (`rollout.sampling.max_tokens`, `objective.overlong_buffer`).
    """
    for rollout in (rollout for group in groups if group.round != EVALUATION for rollout in group.rollouts):
        punishment = soft_overlong_punishment(len(rollout.tokens), longest, buffer)
        rollout.reward += punishment
        rollout.reward_parts = {**rollout.reward_parts, PART: punishment}
