"""Weights changed by a known amount, in place and exactly reversible: what the canary pushes to servers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from rlad_megatron.models.load import is_quantized

# The second bit of the mantissa: weights change by 12% to 25%, up or down as the bit was. With the third, near-certain
# tokens hardly move. With the first, deep models give nothing but noise.
SECOND_MANTISSA_BIT = {
    torch.float32: (torch.int32, 21),
    torch.bfloat16: (torch.int16, 5),
    torch.float16: (torch.int16, 8),
}


@contextmanager
def perturbed(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Flip one bit of every element of distinct parameters until the context ends.

    The change depends on an element's value only, so shards and replicas of a tensor agree in every layout, and it
    needs no copy of the weights. FP8 parameters stay as they are: their bytes are kept twice, by rows and by columns.
    """
    flipped = [parameter for parameter in parameters if not is_quantized(parameter)]
    _flip(flipped)
    try:
        yield
    finally:
        _flip(flipped)


@torch.no_grad()
def _flip(parameters: Iterable[torch.Tensor]) -> None:
    for parameter in parameters:
        integer, bit = SECOND_MANTISSA_BIT[parameter.dtype]
        parameter.detach().view(integer).bitwise_xor_(1 << bit)
