"""Products of matrices that are added up in place, whatever their precision and device."""

from __future__ import annotations

import torch

# From here on oneDNN's float32 product, with the pass that adds it, takes no longer than MKL's, which is `torch.mm` on
# x86 (AMD EPYC, torch 2.13): about the same for 64 rows of 256, 2 to 13 % less for 128 to 1024 rows of 512 and 2048,
# and more yet beside another busy core.
_ONEDNN_ROWS, _ONEDNN_DEPTH = 64, 256
# Of a product that is held beside its sum. oneDNN is as fast with blocks of 1 to 4 MB, of which glibc may keep three;
# bf16 stays in a core's cache until it is added.
_BLOCK_BYTES, _BLOCK_ROWS = 1 << 20, 1024


def add_product_(sum_: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: int = 1) -> None:
    """sum_ = beta * sum_ + left @ right. With beta 0 what sum_ held does not matter.

    Args:
        sum_: [M, N] in the factors' dtype, or float32.
        left, right: [M, K] and [K, N], both fp32, bf16 or fp16; not overlapping sum_.
        beta: 0 or 1.

    A float32 sum of half-precision factors is accumulated in float32. On a CPU each product of bf16 factors is rounded
    to bf16 first, which makes it three times as fast as one of float32 copies, as which fp16 is multiplied. These
    products, those copies, and products by oneDNN are held beside the sum, a block at a time.
    """
    if _faster_by_onednn(left):
        rows = min(_BLOCK_ROWS, left.shape[0])
        columns = _BLOCK_BYTES // (4 * rows)
        for sum_rows, left_rows in zip(sum_.split(rows), left.split(rows), strict=True):
            for part, right_part in zip(sum_rows.split(columns, dim=1), right.split(columns, dim=1), strict=True):
                _add_(part, _by_onednn(left_rows, right_part), beta)
    elif sum_.dtype == left.dtype:
        torch.addmm(sum_, left, right, beta=beta, out=sum_)
    elif sum_.device.type == "cuda":
        torch.addmm(sum_, left, right, beta=beta, out_dtype=sum_.dtype, out=sum_)
    else:
        dtype = torch.bfloat16 if left.dtype == torch.bfloat16 else torch.float32
        right, rows = right.to(dtype), max(1, _BLOCK_BYTES // (dtype.itemsize * max(1, *right.shape)))
        for part, left_rows in zip(sum_.split(rows), left.split(rows), strict=True):
            _add_(part, left_rows.to(dtype) @ right, beta)


def _add_(sum_: torch.Tensor, product: torch.Tensor, beta: int) -> None:
    sum_.add_(product) if beta else sum_.copy_(product)


def _faster_by_onednn(left: torch.Tensor) -> bool:
    """Whether left is a large float32 matrix on a CPU, and not a transposed one, of which oneDNN would take a copy."""
    return (
        (left.device.type, left.dtype) == ("cpu", torch.float32)
        and left.shape[0] >= _ONEDNN_ROWS
        and left.shape[1] >= _ONEDNN_DEPTH
        and left.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _by_onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32, for which torch has no public way to oneDNN. This operator is what Inductor calls."""
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
