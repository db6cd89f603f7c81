"""Decode responses and score them."""

from __future__ import annotations

import math
import traceback

from rlad_megatron.data.tokenizers import Tokenizer
from rlad_megatron.errors import DataError
from rlad_megatron.rewards.registry import Reward, RewardResult
from rlad_megatron.types import Rollout

Scores = list[tuple[str, RewardResult]]


def score_responses(rollouts: list[Rollout], tokenizer: Tokenizer, reward: Reward) -> Scores:
    """(text, result) of each rollout.

    Raises:
        DataError: the reward function raised, or did not return a RewardResult with a finite score.
    """
    scores = []
    for rollout in rollouts:
        text = tokenizer.decode(rollout.tokens)
        try:
            result = reward(rollout.prompt, text)
        except Exception as error:  # user code may raise anything
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise DataError(
                f"data.reward raised {type(error).__name__}: {error} for prompt {rollout.prompt.id!r} "
                f"({frame.filename}:{frame.lineno}); fix the function"
            ) from error
        if not isinstance(result, RewardResult) or not math.isfinite(result.score):
            raise DataError(
                f"data.reward returned {result!r} for prompt {rollout.prompt.id!r}; "
                "return a RewardResult with a finite score"
            )
        scores.append((text, result))
    return scores


def apply_scores(rollouts: list[Rollout], scores: Scores) -> None:
    """Write scores into their rollouts."""
    for rollout, (text, result) in zip(rollouts, scores, strict=True):
        rollout.text, rollout.reward = text, result.score
        rollout.solved, rollout.reward_parts = result.solved, result.parts
