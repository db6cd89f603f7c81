"""Pack samples into micro-batches of similar length, and put every loss at its position.

The only place that shifts: the prediction at position t is scored against the token at t + 1.
All ranks pack the same samples in the same way and take their own part, without communication.

Shape letters: T positions of a micro-batch, N positions with loss, P prompt tokens, R response tokens.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import torch

from rlad_megatron.types import Microbatch, Sample, TokenBatch


def assign_microbatches(lengths: list[int], budget_tokens: int, dp_size: int) -> list[list[list[int]]]:
    """Sample indices of each micro-batch of each data-parallel rank.

    First fit by decreasing length, within `budget_tokens`; a longer sample gets its own micro-batch.
    Every rank gets the same number of micro-batches (some may be empty), because pipeline and expert
    parallelism run in lockstep. The largest are spread so that ranks carry about the same number of tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        fit = next((b for b, left in enumerate(room) if lengths[i] <= left), len(bins))
        if fit == len(bins):
            bins.append([])
            room.append(budget_tokens)
        bins[fit].append(i)
        room[fit] -= lengths[i]
    while not bins or len(bins) % dp_size:
        largest: list[int] = max(bins, key=len, default=[])
        bins.append(largest[1::2])
        del largest[1::2]

    def total(members: list[int]) -> int:
        return sum(lengths[i] for i in members)

    per_rank = len(bins) // dp_size
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    heap = [(0, rank) for rank in range(dp_size)]
    for members in sorted(bins, key=total, reverse=True):
        load, rank = heapq.heappop(heap)
        ranks[rank].append(members)
        if len(ranks[rank]) < per_rank:
            heapq.heappush(heap, (load + total(members), rank))
    return ranks


def pack(samples: list[Sample], *, budget_tokens: int, multiple: int, dp_rank: int, dp_size: int) -> list[Microbatch]:
    """This data-parallel rank's micro-batches, all as long as the longest of any rank, rounded up to `multiple`.

    Equal lengths keep the pipeline's messages static.
    """
    lengths = [sample.tokens.numel() for sample in samples]
    ranks = assign_microbatches(lengths, budget_tokens, dp_size)
    longest = max(sum(lengths[i] for i in members) for rank in ranks for members in rank)
    total = max(-(-longest // multiple) * multiple, multiple)
    return [_pack_one(samples, members, total) for members in ranks[dp_rank]]


def _pack_one(samples: list[Sample], members: list[int], total: int) -> Microbatch:
    packed = [samples[i] for i in members]
    segments = [sample.tokens for sample in packed]
    if padding := total - sum(map(len, segments)):
        segments.append(torch.zeros(padding, dtype=torch.int64))
    starts = [0, *itertools.accumulate(map(len, segments))]
    loss_positions = [
        torch.arange(start + sample.prompt_length - 1, stop - 1)
        for sample, (start, stop) in zip(packed, itertools.pairwise(starts), strict=False)
    ]

    def known(log_probs: Callable[[Sample], torch.Tensor | None]) -> torch.Tensor | None:
        # An empty micro-batch has the same fields as the others, so that every rank reports the same metrics.
        is_known = samples and log_probs(samples[0]) is not None
        return _join([log_probs(sample) for sample in packed]) if is_known else None

    return Microbatch(
        tokens=torch.cat(segments)[None],
        positions=torch.cat([torch.arange(len(segment)) for segment in segments])[None],
        segment_starts=torch.tensor(starts, dtype=torch.int32),
        loss_positions=_join(loss_positions, torch.int64),
        targets=_join([sample.tokens[sample.prompt_length :] for sample in packed], torch.int64),
        per_token=TokenBatch(
            weight=_join([sample.weight for sample in packed]),
            advantage=_join([torch.full((sample.response_length,), sample.advantage) for sample in packed]),
            sampler_log_probs=known(lambda sample: sample.sampler_log_probs),
            teacher_log_probs=known(lambda sample: sample.teacher_log_probs),
            old_log_probs=known(lambda sample: sample.old_log_probs),
        ),
        samples=members,
    )


def _join(parts: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *parts])
