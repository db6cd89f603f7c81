"""The Triton twin of kernels/softmax_torch.py, with the same signatures, for CUDA.

Each row is read twice: for its statistics (online maximum and sum) and to write its gradient. No other memory is used.
Reads and writes extend to the row's stride, past its last column. The fused loss uses strides that are multiples of
128, which allows 128-bit accesses for any vocabulary.

Without a GPU it is tested in Triton's interpreter (TRITON_INTERPRET=1) and compiled to machine code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlad_megatron.kernels.softmax_torch import NOT_HERE

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _row_stats_kernel(
    logits, target, stats, stride, columns, num_rows, inverse_temperature, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)  # sum of exp(x) * x
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        value = tl.load(logits + row * stride + column, mask=column < stride, other=float("-inf")).to(tl.float32)
        value = tl.where(mask, value, float("-inf"))
        # tl.max drops NaN and the sum below keeps it, so a NaN logit makes the row's sum NaN.
        higher = tl.maximum(maximum, tl.max(value, axis=0))
        shift = tl.where(maximum == float("-inf"), 0.0, (maximum - higher) * inverse_temperature)
        x = tl.where(mask, (value - higher) * inverse_temperature, 0.0)
        exp = tl.where(mask, tl.exp(x), 0.0)
        if ENTROPY:
            inner = tl.sum(exp * x, axis=0)
            weighted = (weighted + shift * total) * tl.exp(shift) + inner
        total = total * tl.exp(shift) + tl.sum(exp, axis=0)
        maximum = higher
    place = tl.load(target + row)
    here = place >= 0
    target_logit = tl.load(logits + row * stride + place, mask=here, other=float("-inf")).to(tl.float32)
    tl.store(stats + row, maximum)
    tl.store(stats + num_rows + row, total)
    tl.store(stats + 2 * num_rows + row, target_logit)
    tl.store(stats + 3 * num_rows + row, weighted)


@triton.jit
def _gradient_kernel(
    logits,
    maximum,
    target,
    factor,
    log_factor,
    target_gradient,
    stride,
    inverse_temperature,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < stride
    value = tl.load(logits + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    x = (value - tl.load(maximum + row)) * inverse_temperature
    exp = tl.exp(x)
    gradient = tl.load(factor + row) * exp
    if ENTROPY:
        gradient += tl.load(log_factor + row) * tl.where(exp > 0, x * exp, 0.0)
    gradient = tl.where(column == tl.load(target + row), tl.load(target_gradient + row), gradient)
    tl.store(logits + row * stride + column, gradient.to(logits.dtype.element_ty), mask=mask)


def row_stats_(logits_CV: torch.Tensor, target_C: torch.Tensor, temperature: float, *, entropy: bool) -> torch.Tensor:
    """As in kernels/softmax_torch.py, but leaves the logits unchanged."""
    C, columns = logits_CV.shape
    stats_4C = torch.empty(4, C, dtype=torch.float32, device=logits_CV.device)
    if C > 0:
        _row_stats_kernel[(C,)](
            logits_CV,
            target_C,
            stats_4C,
            logits_CV.stride(0),
            columns,
            C,
            1.0 / temperature,
            ENTROPY=entropy,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return stats_4C


def gradient_(
    logits_CV: torch.Tensor,
    stats_4C: torch.Tensor,
    target_C: torch.Tensor,
    factor_C: torch.Tensor,
    target_gradient_C: torch.Tensor,
    temperature: float,
    log_factor_C: torch.Tensor | None = None,
) -> None:
    """As in kernels/softmax_torch.py. Also overwrites the gap between the last column and the next row."""
    C, columns = logits_CV.shape
    if C == 0 or columns == 0:
        return
    _gradient_kernel[(C, triton.cdiv(columns, _BLOCK))](
        logits_CV,
        stats_4C[0].contiguous(),
        target_C,
        factor_C.contiguous(),
        factor_C if log_factor_C is None else log_factor_C.contiguous(),  # unread if None
        target_gradient_C.contiguous(),
        logits_CV.stride(0),
        1.0 / temperature,
        ENTROPY=log_factor_C is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


assert NOT_HERE < 0  # the kernels test for a negative place
