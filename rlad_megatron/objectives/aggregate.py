"""Token weights: how a loss over responses of different lengths becomes one mean, whatever the split.

R_i is the number of tokens of response i. The weights hold the global count already, so that
loss = -sum(weight * surrogate), summed over every micro-batch and every data-parallel rank, is the mean: nothing is
divided later, and no split changes the result.
"""

from __future__ import annotations

import torch

AGGREGATIONS = ("sequence_mean", "token_mean")


def token_weights(
    response_lengths: list[int],
    aggregation: str,
    *,
    num_responses: int | None = None,
    num_tokens: int | None = None,
) -> list[torch.Tensor]:
    """The weight of every token of the given responses.

    sequence_mean: 1 / (num_responses * R_i), the mean over responses of the mean over tokens (RLAD, GRPO).
    token_mean: 1 / num_tokens, the mean over all tokens of the update (DAPO).

    Responses of dropped groups (equal rewards, advantage 0) count in the mean as zeros, as they do in GRPO: the
    denominator is that of the whole batch. So either pass all lengths and ignore the weights of dropped responses,
    or pass the lengths of what is trained on and the batch's totals as `num_responses` and `num_tokens`. The weights
    then sum to the share that is trained on, which is 1 when nothing was dropped.

    Args:
        response_lengths: R_i of each response to weigh; 0 gives an empty tensor, and the response still counts.
        aggregation: "sequence_mean" or "token_mean".
        num_responses: responses of the whole update; by default len(response_lengths). Read by sequence_mean.
        num_tokens: response tokens of the whole update; by default sum(response_lengths). Read by token_mean.

    Returns:
        float32 [R_i] for each response.

    Raises:
        ValueError: unknown aggregation, a negative length, or a total smaller than what is given.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation {aggregation!r} is unknown; choose one of: {', '.join(AGGREGATIONS)}")
    if any(length < 0 for length in response_lengths):
        raise ValueError(f"response_lengths must not be negative, got {min(response_lengths)}")
    num_responses = len(response_lengths) if num_responses is None else num_responses
    num_tokens = sum(response_lengths) if num_tokens is None else num_tokens
    if num_responses < len(response_lengths):
        raise ValueError(f"num_responses {num_responses} is below the {len(response_lengths)} responses given")
    if num_tokens < sum(response_lengths):
        raise ValueError(f"num_tokens {num_tokens} is below the {sum(response_lengths)} tokens given")
    if aggregation == "sequence_mean":
        return [torch.full((length,), 1.0 / (num_responses * max(length, 1))) for length in response_lengths]
    return [torch.full((length,), 1.0 / max(num_tokens, 1)) for length in response_lengths]
