"""Context parallelism: which tokens of a packed micro-batch each rank holds, and whose values its results are.

The order is Megatron's balanced one. Each segment is cut into 2 * CP chunks of the same length, and rank r holds chunks
r and 2 * CP - 1 - r of every segment: under a causal mask late tokens cost more than early ones, and each rank gets as
many of both. Source: `thd_get_partitioned_indices` of Transformer Engine (common/fused_attn/context_parallel.cu).

Shape letters: T tokens of the whole micro-batch, S segments, N tokens with loss (all of them, or those of this rank).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import torch

from rlad_megatron.types import Microbatch


class Chunk(NamedTuple):
    """Tokens [start, stop) of the whole micro-batch, in the segment that starts at `segment`."""

    segment: int
    start: int
    stop: int


def segment_multiple(size: int) -> int:
    """The length of every segment is a multiple of this over `size` context-parallel ranks."""
    return 2 * size if size > 1 else 1


def held_chunks(segment_starts: torch.Tensor, rank: int, size: int) -> list[Chunk]:
    """The tokens that a context-parallel rank holds, in the order in which it holds them.

    segment_starts: int [S + 1] on the CPU, of the whole micro-batch; the lengths are multiples of `segment_multiple`.
    """
    starts = segment_starts.tolist()
    if size == 1:
        return [Chunk(start, start, stop) for start, stop in itertools.pairwise(starts)]
    chunks = []
    for start, stop in itertools.pairwise(starts):
        length, rest = divmod(stop - start, 2 * size)
        assert rest == 0, (start, stop, size)
        for index in (rank, 2 * size - 1 - rank):
            chunks.append(Chunk(start, start + index * length, start + (index + 1) * length))
    return chunks


def held_positions(segment_starts: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """int64 [T / size], the positions in the whole micro-batch of the tokens that a context-parallel rank holds."""
    chunks = held_chunks(segment_starts, rank, size)
    return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])


def cut(microbatch: Microbatch, rank: int, size: int) -> Microbatch:
    """A context-parallel rank's share of a whole micro-batch on the CPU: its tokens, and the losses at them.

    The targets come from the whole micro-batch, because the token after a chunk's last one is on another rank.
    """
    if size == 1:
        return microbatch
    held = held_positions(microbatch.segment_starts, rank, size)
    place = torch.full((microbatch.tokens.shape[1],), -1)
    place[held] = torch.arange(held.numel())
    loss_positions = place[microbatch.loss_positions]
    kept = (loss_positions >= 0).nonzero()[:, 0]
    return replace(
        microbatch,
        tokens=microbatch.tokens[:, held],
        positions=microbatch.positions[:, held],
        loss_positions=loss_positions[kept],
        targets=microbatch.targets[kept],
        per_token=microbatch.per_token[kept],
        loss_indices=microbatch.loss_indices[kept],
        experts=None if microbatch.experts is None else microbatch.experts[held],
    )


def join(values_N: torch.Tensor, microbatch: Microbatch, of_sample: list[torch.Tensor]) -> None:
    """Write a rank's values of its loss-carrying tokens to their places in the samples; `cut` backwards.

    of_sample: for each sample of the run's batch a tensor of its response's length. Those of other ranks' tokens stay
    as they are, so that with zeros at first a sum over ranks makes the samples whole.
    """
    whole = torch.cat([values_N.new_empty(0), *(of_sample[i] for i in microbatch.samples)])
    whole[microbatch.loss_indices.to(whole.device)] = values_N
    parts = whole.split([of_sample[i].numel() for i in microbatch.samples])
    for i, part in zip(microbatch.samples, parts, strict=True):
        of_sample[i].copy_(part)
