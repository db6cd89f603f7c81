"""Samples of random tokens, for measurements of time and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlad_megatron.objectives.aggregate import token_weights
from rlad_megatron.types import Sample


def synthetic_samples(
    lengths: Sequence[tuple[int, int]], vocab_size: int, *, aggregation: str = "sequence_mean", seed: int = 0
) -> list[Sample]:
    """The samples of one update, with advantages of 1 and -1 in turn and without log-probs.

    lengths: (prompt, response) of each sample, in tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = token_weights([response for _, response in lengths], aggregation)
    return [
        Sample(
            tokens=torch.randint(0, vocab_size, (prompt + response,), generator=generator),
            prompt_length=prompt,
            weight=weight,
            advantage=1.0 if i % 2 else -1.0,
        )
        for i, ((prompt, response), weight) in enumerate(zip(lengths, weights, strict=True))
    ]
