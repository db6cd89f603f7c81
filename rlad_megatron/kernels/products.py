"""Products of matrices that are added up in place, whatever their precision and device."""

from __future__ import annotations

import torch

# From these sizes on oneDNN's float32 product, with the pass that adds it, takes less time than MKL's.
_ONEDNN_ROWS, _ONEDNN_DEPTH = 64, 256


def add_product_(sum_: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: int = 1) -> None:
    """sum_ = beta * sum_ + left @ right. With beta 0 what sum_ held does not matter.

    Args:
        sum_: [M, N] in the factors' dtype, or float32.
        left, right: [M, K] and [K, N], both fp32, bf16 or fp16; not overlapping sum_.
        beta: 0 or 1.

    A float32 sum of half-precision factors is accumulated in float32. On a CPU each product of bf16 factors is rounded
    to bf16 first, which makes it three times as fast as one of float32 copies.
    """
    if sum_.device.type == "cuda" and sum_.dtype != left.dtype:
        torch.addmm(sum_, left, right, beta=beta, out_dtype=sum_.dtype, out=sum_)
    elif sum_.dtype == left.dtype and not _faster_by_onednn(left):
        torch.addmm(sum_, left, right, beta=beta, out=sum_)
    elif left.dtype == torch.float16:
        torch.addmm(sum_, left.float(), right.float(), beta=beta, out=sum_)
    else:
        product = _by_onednn(left, right) if left.dtype == torch.float32 else left @ right
        sum_.add_(product) if beta else sum_.copy_(product)


def _faster_by_onednn(left: torch.Tensor) -> bool:
    rows, depth = left.shape
    return (
        (left.device.type, left.dtype) == ("cpu", torch.float32)
        and rows >= _ONEDNN_ROWS
        and depth >= _ONEDNN_DEPTH
        and torch.backends.mkldnn.is_available()
    )


def _by_onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32, for which torch has no public way to oneDNN. This operator is what Inductor calls."""
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
