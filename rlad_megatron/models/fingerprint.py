"""A fingerprint of a tensor that does not depend on how it was cut: the proof that every value of a push arrived."""

from __future__ import annotations

import math

import torch

from rlad_megatron.models.box import Box

CHUNK_ELEMENTS = 1 << 20  # of a temporary copy
WORD_BYTES = 8
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(values: torch.Tensor, box: Box | None = None) -> torch.Tensor:
    """Sum over the elements of (bits of the value) * (a number that follows from the element's index), mod 2^64.

    A row is read as words of 8 bytes: an element's number is odd, then shifted to the element's place in the word.

    Args:
        values: a tensor of any dtype and at least one dimension, or the part of one that `box` names.
        box: where `values` lie in the whole tensor; None: they are all of it.

    Returns:
        int64 scalar on the values' device. The parts of a tensor sum up to the fingerprint of the whole. A change of
        one element always changes it, because the number is odd. A permutation changes it, except by a chance of about
        2^-16 where it exchanges only two bf16 values at the end of their words, and far less for any other.
    """
    box = box or Box.whole(values.shape)
    lanes = WORD_BYTES // values.element_size()
    start, stop = box[-1]
    inner_W = _odd_numbers(start // lanes, -(-stop // lanes), len(box) - 1, values.device)
    outer_R = torch.ones(1, dtype=torch.int64, device=values.device)
    for dim, (first, last) in enumerate(box[:-1]):
        outer_R = (outer_R[:, None] * _odd_numbers(first, last, dim, values.device)).flatten()
    rows_RC = values.reshape(math.prod(box.sizes[:-1]), stop - start)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    chunk = max(1, CHUNK_ELEMENTS // max(1, stop - start))
    for part_RC, factor_R in zip(rows_RC.split(chunk), outer_R.split(chunk), strict=True):
        total += (_row_sums(part_RC, start, inner_W, lanes) * factor_R).sum()
    return total


def _row_sums(rows_RC: torch.Tensor, start: int, factor_W: torch.Tensor, lanes: int) -> torch.Tensor:
    """int64 [R]. start: index of the first column. factor_W: of each word that the columns are in."""
    columns = rows_RC.shape[1]
    if start % lanes or columns % lanes:  # a row that begins or ends within a word
        bits = 8 * rows_RC.element_size()
        index_C = torch.arange(start, start + columns, device=rows_RC.device)
        factor_C = factor_W[index_C // lanes - start // lanes] << (index_C % lanes * bits)
        mask = (1 << bits) - 1 if lanes > 1 else -1
        values_RC = rows_RC.contiguous().view(BITS[rows_RC.element_size()]).to(torch.int64) & mask
        return (values_RC * factor_C).sum(-1)
    if rows_RC.storage_offset() % lanes or rows_RC.stride(0) % lanes or rows_RC.stride(1) != 1:
        rows_RC = rows_RC.clone(memory_format=torch.contiguous_format)
    words_RW = rows_RC.view(torch.int64)
    # One pass over memory; torch has this product for integers only on CPUs.
    return words_RW.mv(factor_W) if words_RW.is_cpu else (words_RW * factor_W).sum(-1)


def _odd_numbers(start: int, stop: int, dim: int, device: torch.device) -> torch.Tensor:
    """int64 [stop - start] that look random: the finalizer of splitmix64 over index and dimension."""
    numbers = torch.arange(start, stop, dtype=torch.int64, device=device) + (dim + 1) * (1 << 40)
    for multiplier, shift in ((-0x61C8864680B583EB, 30), (-0x40A7B892E31B1A47, 27), (-0x6B2FB644ECCEEE15, 31)):
        numbers = numbers * multiplier
        numbers = numbers ^ (numbers >> shift)
    return numbers | 1
