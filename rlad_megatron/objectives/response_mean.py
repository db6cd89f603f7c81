"""Means over whole responses, which an objective may need at each of their tokens.

N is the number of loss-carrying tokens, S of responses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def response_mean(
    value_N: torch.Tensor,
    response_N: torch.Tensor,
    length_S: torch.Tensor,
    sum_over_ranks: Callable[[torch.Tensor], object] = lambda sums: None,
) -> torch.Tensor:
    """The mean over all tokens of a response, at each of its tokens here.

    Args:
        value_N: float32 [N].
        response_N: int64 [N], to which response a token belongs.
        length_S: int64 [S], all tokens of each response, also those of other ranks.
        sum_over_ranks: adds up sums in place over the ranks that hold tokens of the same responses.

    Returns:
        float32 [N], detached.
    """
    sums_S = torch.zeros(length_S.shape, dtype=torch.float64, device=value_N.device)
    sums_S.index_add_(0, response_N, value_N.detach().double())
    sum_over_ranks(sums_S)
    return (sums_S / length_S.clamp(min=1))[response_N].float()
