"""Token weights: how a loss over responses of different lengths becomes one mean.

R_i is the number of tokens of response i. The weights already contain the division by the global count, so
loss = -sum(weight * surrogate) over all micro-batches and data-parallel ranks is the mean, however tokens are split.
"""

from __future__ import annotations

import math

import torch


def token_weights(
    response_lengths: list[int], aggregation: str, whole: tuple[int, int] | None = None
) -> list[torch.Tensor]:
    """The weight of every token of an update's responses.

    sequence_mean: 1 / (number of responses * R_i), the mean over responses of the mean over tokens (RLAD, GRPO).
    token_mean: 1 / number of tokens, the mean over all tokens of the update (DAPO).
    fixed_length: 1 / (number of responses * the longest possible length), a constant (Dr. GRPO, arXiv 2503.20783), so
        that a token weighs the same in a response of any length.

    Responses of dropped groups (equal rewards, advantage 0) count in the mean as zeros, as in GRPO: pass all lengths
    and ignore the weights of dropped responses. The other weights sum to the share of the batch that is trained on.

    Args:
        response_lengths: R_i of each response of the update. A response of length 0 has no weights but still counts.
        aggregation: "sequence_mean", "token_mean" or "fixed_length".
        whole: (number of responses, most tokens of one) of the whole update, if these are a part of it (a wave). The
            number of all tokens is then not known yet: token_mean divides by its upper bound, and `wave_scale` corrects
            that. fixed_length needs it.

    Returns:
        float32 [R_i] for each response.

    Raises:
        ValueError: unknown aggregation, a negative length, or fixed_length without `whole`.
    """
    if any(length < 0 for length in response_lengths):
        raise ValueError(f"response_lengths must not be negative, got {min(response_lengths)}")
    if aggregation == "sequence_mean":
        count = whole[0] if whole else len(response_lengths)
        return [torch.full((length,), 1.0 / (count * max(length, 1))) for length in response_lengths]
    if aggregation == "fixed_length":
        if whole is None:
            raise ValueError("aggregation 'fixed_length' needs the longest possible length")
        return [torch.full((length,), 1.0 / math.prod(whole)) for length in response_lengths]
    if aggregation == "token_mean":
        count = math.prod(whole) if whole else max(sum(response_lengths), 1)
        return [torch.full((length,), 1.0 / count) for length in response_lengths]
    raise ValueError(f"aggregation {aggregation!r} is unknown; choose one of: sequence_mean, token_mean, fixed_length")


def wave_scale(response_lengths: list[int], aggregation: str, longest: int) -> float:
    """What the sum over an update's waves lacks, given all its responses. longest: the second number of `whole`."""
    return len(response_lengths) * longest / max(sum(response_lengths), 1) if aggregation == "token_mean" else 1.0
