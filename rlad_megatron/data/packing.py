"""Pack samples into micro-batches of about the same cost on every rank, and put every loss at its position.

The only place that shifts: the prediction at position t is scored against the token at t + 1.
All ranks pack the same samples in the same way and take their own part, without communication.

Shape letters: T positions of a micro-batch, N positions with loss, P prompt tokens, R response tokens.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import pad

from rlad_megatron.parallel.context import cut, segment_multiple
from rlad_megatron.parallel.lengths import padded_length
from rlad_megatron.types import Microbatch, Sample, TokenBatch


def assign_microbatches(
    lengths: list[int], budget_tokens: int, dp_size: int, count_multiple: int = 1
) -> list[list[list[int]]]:
    """Sample indices of each micro-batch of each data-parallel rank.

    A micro-batch holds at most `budget_tokens`, or one longer sample. Every rank gets the same number of micro-batches,
    a multiple of `count_multiple`, the longest first; some may be empty. Pipeline and expert parallelism run them in
    lockstep, so those at the same position should take about the same time.
    """
    ranks = _spread(range(len(lengths)), lengths, dp_size)

    def microbatches(count: int) -> list[list[list[int]]]:
        return [_spread(members, lengths, count) for members in ranks]

    def fits(count: int) -> bool:
        found = itertools.chain.from_iterable(microbatches(count))
        return all(len(members) <= 1 or sum(lengths[i] for i in members) <= budget_tokens for members in found)

    counts = range(1, max(1, *map(len, ranks)) + 1)  # one for each sample always fits
    fewest = counts[bisect.bisect_left(counts, True, key=fits)]
    return microbatches(-(-fewest // count_multiple) * count_multiple)


def _spread(samples: Iterable[int], lengths: list[int], parts: int) -> list[list[int]]:
    """Divide samples into parts of about as many tokens: the longest sample first, each to the emptiest part."""
    members: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, part) for part in range(parts)]
    for i in sorted(samples, key=lambda i: -lengths[i]):
        tokens, part = heap[0]
        members[part].append(i)
        heapq.heapreplace(heap, (tokens + lengths[i], part))
    return [members[part] for _, part in sorted(heap, key=lambda entry: -entry[0])]


def pack(
    samples: list[Sample],
    *,
    budget_tokens: int,
    multiple: int,
    dp_rank: int,
    dp_size: int,
    cp_rank: int = 0,
    cp_size: int = 1,
    count_multiple: int = 1,
) -> list[Microbatch]:
    """This rank's micro-batches: the data-parallel rank's, of which it holds its context-parallel share.

    The whole of each is padded to a multiple of `multiple` tokens (`padded_length`), which `cp_size` ranks can share;
    with several of them so is each sample, at its end, where no other token attends to the padding. There are a
    multiple of `count_multiple` micro-batches.
    """
    of_segment = segment_multiple(cp_size)
    assert multiple % of_segment == 0, (multiple, cp_size)
    lengths = [sample.tokens.numel() + -sample.tokens.numel() % of_segment for sample in samples]
    ranks = assign_microbatches(lengths, budget_tokens, dp_size, count_multiple)
    whole = (_pack_one(samples, lengths, members, multiple) for members in ranks[dp_rank])
    return [cut(microbatch, cp_rank, cp_size) for microbatch in whole]


def _pack_one(samples: list[Sample], lengths: list[int], members: list[int], multiple: int) -> Microbatch:
    """The whole micro-batch of some samples, each padded to its length in `lengths`."""
    packed = [samples[i] for i in members]
    segments = [pad(samples[i].tokens, (0, lengths[i] - samples[i].tokens.numel())) for i in members]
    tokens = sum(map(len, segments))
    if padding := padded_length(tokens, multiple) - tokens:
        segments.append(torch.zeros(padding, dtype=torch.int64))
    starts = [0, *itertools.accumulate(map(len, segments))]
    loss_positions = [
        torch.arange(start + sample.prompt_length - 1, start + sample.tokens.numel() - 1)
        for sample, start in zip(packed, starts, strict=False)
    ]
    targets = _join([sample.tokens[sample.prompt_length :] for sample in packed], torch.int64)

    def known(values: Callable[[Sample], torch.Tensor | None]) -> torch.Tensor | None:
        # An empty micro-batch has the same fields as the others, so that every rank reports the same metrics.
        is_known = samples and values(samples[0]) is not None
        return _join([values(sample) for sample in packed]) if is_known else None

    def solved(sample: Sample) -> torch.Tensor | None:
        return None if sample.solved is None else torch.full((sample.response_length,), float(sample.solved))

    return Microbatch(
        tokens=torch.cat(segments)[None],
        positions=torch.cat([torch.arange(len(segment)) for segment in segments])[None],
        segment_starts=torch.tensor(starts, dtype=torch.int32),
        loss_positions=_join(loss_positions, torch.int64),
        targets=targets,
        per_token=TokenBatch(
            weight=_join([sample.weight for sample in packed]),
            advantage=_join([torch.full((sample.response_length,), sample.advantage) for sample in packed]),
            sampler_log_probs=known(lambda sample: sample.sampler_log_probs),
            teacher_log_probs=known(lambda sample: sample.teacher_log_probs),
            old_log_probs=known(lambda sample: sample.old_log_probs),
            reference_log_probs=known(lambda sample: sample.reference_log_probs),
            solved=known(solved),
        ),
        loss_indices=torch.arange(targets.numel()),
        samples=members,
        response_lengths=torch.tensor([sample.response_length for sample in packed], dtype=torch.int64),
        experts=_experts(samples, members, starts),
    )


def _experts(samples: list[Sample], members: list[int], starts: list[int]) -> torch.Tensor | None:
    """The experts of a micro-batch's tokens, [T, L, K]; None if the samples have none. starts: of its segments.

    The sampler never read a sample's last token, nor padding. No loss depends on these, so they go to experts 0..K-1.
    """
    if not samples or samples[0].experts is None:
        return None
    _, layers, per_token = samples[0].experts.shape
    experts_TLK = torch.arange(per_token).to(samples[0].experts.dtype).repeat(starts[-1], layers, 1)
    for i, start in zip(members, starts, strict=False):
        experts_TLK[start : start + samples[i].tokens.numel() - 1] = samples[i].experts
    return experts_TLK


def _join(parts: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *parts])
