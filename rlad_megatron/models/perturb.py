"""Weights changed by a known amount, in place and exactly reversible: what the canary pushes to servers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from rlad_megatron.models.load import is_quantized

# Bits of the mantissa, from the top, weakest first: weights change by at most 3%, 6%, 12%, 25%, up or down as the bit
# was. A weak one does not move near-certain tokens; a strong one leaves nothing but noise of a deep model in bf16.
STRENGTHS = (5, 4, 3, 2)
_MANTISSA = {  # as integers, and bits of the mantissa
    torch.float32: (torch.int32, 23),
    torch.bfloat16: (torch.int16, 7),
    torch.float16: (torch.int16, 10),
}


@contextmanager
def perturbed(parameters: Iterable[torch.Tensor], bit: int) -> Iterator[None]:
    """Flip one bit (STRENGTHS) of every element of distinct parameters until the context ends.

    The change depends on an element's value only, so shards and replicas of a tensor agree in every layout, and it
    needs no copy of the weights. FP8 parameters stay as they are: their bytes are kept twice, by rows and by columns.
    """
    flipped = [parameter for parameter in parameters if not is_quantized(parameter)]
    _flip(flipped, bit)
    try:
        yield
    finally:
        _flip(flipped, bit)


@torch.no_grad()
def _flip(parameters: Iterable[torch.Tensor], bit: int) -> None:
    for parameter in parameters:
        integer, mantissa = _MANTISSA[parameter.dtype]
        parameter.detach().view(integer).bitwise_xor_(1 << (mantissa - bit))
