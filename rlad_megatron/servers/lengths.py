"""How long a sequence may become on the rollout servers. The trainer and whoever starts the servers must agree."""

from __future__ import annotations

from collections.abc import Iterable

from rlad_megatron.config import RunConfig
from rlad_megatron.types import Prompt

PROBE_TOKENS = 8  # decoded after each sync and compared with the trainer


def longest_response(config: RunConfig) -> int:
    """Tokens that a server must have room for after the longest prompt."""
    return max(config.rollout.sampling.max_tokens, config.eval.sampling.max_tokens, PROBE_TOKENS)


def max_model_len(config: RunConfig, prompts: Iterable[Prompt]) -> int:
    """Tokens of the longest prompt and of the longest response together."""
    return max(len(prompt.tokens) for prompt in prompts) + longest_response(config)
