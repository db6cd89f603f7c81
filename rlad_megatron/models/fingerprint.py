"""A fingerprint of a tensor that does not depend on how it was cut: the proof that every value of a push arrived."""

from __future__ import annotations

import torch

from rlad_megatron.models.box import Box

CHUNK_ELEMENTS = 1 << 20  # of an int64 copy: 8 MB
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(values: torch.Tensor, box: Box | None = None) -> torch.Tensor:
    """Sum over the elements of (bits of the value) * (an odd number that follows from the element's index), mod 2^64.

    Args:
        values: a tensor of any dtype and at least one dimension, or the part of one that `box` names.
        box: where `values` lie in the whole tensor; None: they are all of it.

    Returns:
        int64 scalar on the values' device. The parts of a tensor sum up to the fingerprint of the whole. A change of
        one element always changes it, because the factor is odd; a permutation does, except by a chance of about
        2^-64 for each bit that the values have in common.
    """
    box = box or Box.whole(values.shape)
    # The factor is a product over dimensions, so that a chunk needs one multiplication an element.
    factors = [_odd_numbers(start, stop, dim, values.device) for dim, (start, stop) in enumerate(box)]
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    rows = max(1, CHUNK_ELEMENTS // max(1, values[:1].numel()))
    for part, factor in zip(values.split(rows), factors[0].split(rows), strict=True):
        sums = part.contiguous().view(BITS[values.element_size()]).to(torch.int64)
        for others in reversed(factors[1:]):
            sums = (sums * others).sum(-1)
        total += (sums * factor).sum()
    return total


def _odd_numbers(start: int, stop: int, dim: int, device: torch.device) -> torch.Tensor:
    """int64 [stop - start] that look random: the finalizer of splitmix64 over index and dimension."""
    numbers = torch.arange(start, stop, dtype=torch.int64, device=device) + (dim + 1) * (1 << 40)
    for multiplier, shift in ((-0x61C8864680B583EB, 30), (-0x40A7B892E31B1A47, 27), (-0x6B2FB644ECCEEE15, 31)):
        numbers = numbers * multiplier
        numbers = numbers ^ (numbers >> shift)
    return numbers | 1
