"""Matrix products added to a matrix in place, in any precision and on any device."""

from __future__ import annotations

import torch

_BLOCK_ELEMENTS = 1 << 18  # of a float32 copy: 1 MB


def add_product_(sum_: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: int = 1) -> None:
    """sum_ = beta * sum_ + left @ right. With beta 0 the old values of sum_ do not matter.

    Args:
        sum_: [M, N] in the factors' dtype, or float32.
        left, right: [M, K] and [K, N], both fp32, bf16 or fp16; they do not overlap sum_.
        beta: 0 or 1.

    Products of half precision are accumulated in float32. CPUs have none with a float32 result, so there float32 copies
    are multiplied: of `right`, and of some rows of `left` at a time.
    """
    if sum_.dtype == left.dtype:
        torch.addmm(sum_, left, right, beta=beta, out=sum_)
    elif sum_.is_cuda:
        torch.addmm(sum_, left, right, beta=beta, out_dtype=sum_.dtype, out=sum_)
    else:
        right, rows = right.float(), max(1, _BLOCK_ELEMENTS // max(1, left.shape[1]))
        for part, left_rows in zip(sum_.split(rows), left.split(rows), strict=True):
            torch.addmm(part, left_rows.float(), right, beta=beta, out=part)
