"""Softmax statistics and the gradient of a chunk of logits, in torch: the reference, and what CPUs run.

Shape letters: C tokens of a chunk, V' real columns of this rank's vocabulary shard (no padding).
Both functions work in place on the chunk's only buffer. Its content between the two calls is up to the twin: here it is
exp((l - m) / temperature), so `gradient_` does not need the maximum and the temperature.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

NOT_HERE = -1  # local target of a token whose target is on another rank

# Elements of a block of rows, which half precision copies to float32.
_CPU_ELEMENTS = 1 << 18  # stays in a core's cache from the maximum to the sum
_GPU_ELEMENTS = 1 << 24  # 64 MB in float32: large next to a launch, small next to a chunk


def row_stats_(logits_CV: torch.Tensor, target_C: torch.Tensor, temperature: float, *, entropy: bool) -> torch.Tensor:
    """Statistics of each row, over this rank's columns.

    Args:
        logits_CV: [C, V'] fp32, bf16 or fp16; overwritten.
        target_C: int64 [C], local column of the target, or NOT_HERE.
        temperature: divides the logits.
        entropy: compute the last statistic, which is 0 otherwise.

    Returns:
        float32 [4, C]: maximum m of the logits; sum of exp((l - m) / temperature); the target's logit, -inf if it is
        on another rank; sum of exp(x) * x with x = (l - m) / temperature. Without columns: -inf, 0, -inf, 0.
    """
    C, columns = logits_CV.shape
    stats_4C = torch.zeros(4, C, dtype=torch.float32, device=logits_CV.device)
    if columns == 0:
        stats_4C[0::2] = float("-inf")
        return stats_4C
    here_C = target_C != NOT_HERE
    target_logit_C = logits_CV.gather(1, target_C.clamp(min=0)[:, None])[:, 0].float()
    stats_4C[2] = target_logit_C.where(here_C, float("-inf"))
    for rows, x in _float32_rows(logits_CV):
        stats_4C[0, rows] = maximum = x.amax(dim=1)
        x.sub_(maximum[:, None])
        if temperature != 1.0:
            x.div_(temperature)
        shifted = x.clone() if entropy else None
        # Not torch.softmax: its plain sum is up to 1e-5 off over 150,000 columns, and `sum` adds pairwise.
        stats_4C[1, rows] = x.exp_().sum(dim=1)
        if shifted is not None:
            stats_4C[3, rows] = shifted.mul_(x).sum(dim=1)
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
    """After `row_stats_`: turn the chunk into the gradient of its logits.

    With x_v = (l_v - m) / temperature, column v of a row becomes (factor + log_factor * x_v) * exp(x_v), and the
    target's column, where it is here, becomes `target_gradient_C`. The caller computes that one in float32: 1 - p
    cancels in half precision.

    Args:
        logits_CV: what `row_stats_` left.
        stats_4C: what `row_stats_` returned.
        target_C, temperature: as in `row_stats_`.
        factor_C, target_gradient_C: float32 [C].
        log_factor_C: float32 [C], which the gradient of the entropy needs; None is 0, without its cost.
    """
    if logits_CV.shape[1] == 0:
        return
    for rows, x in _float32_rows(logits_CV):
        if log_factor_C is None:
            x.mul_(factor_C[rows, None])
        else:
            # x is exp(x_v). One that underflows to 0 has no part in the entropy.
            of_log = torch.special.xlogy(x, x).mul_(log_factor_C[rows, None])
            x.mul_(factor_C[rows, None]).add_(of_log)
    # A boolean index would make the host wait for a GPU. scatter_ on a CPU copies all half-precision logits to float32.
    row_C, column_C = torch.arange(target_C.shape[0], device=target_C.device), target_C.clamp(min=0)
    value_C = target_gradient_C.to(logits_CV.dtype)
    logits_CV[row_C, column_C] = value_C.where(target_C != NOT_HERE, logits_CV[row_C, column_C])


def _float32_rows(logits_CV: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows to modify in place. Half precision is copied to float32 and written back."""
    C, columns = logits_CV.shape
    size = min(C, max(1, (_CPU_ELEMENTS if logits_CV.device.type == "cpu" else _GPU_ELEMENTS) // columns))
    copy = None if logits_CV.dtype == torch.float32 else logits_CV.new_empty(size, columns, dtype=torch.float32)
    for start in range(0, C, max(1, size)):
        rows = slice(start, start + size)
        block = logits_CV[rows]
        if copy is None:
            yield rows, block
        else:
            x = copy[: block.shape[0]].copy_(block)
            yield rows, x
            block.copy_(x)
