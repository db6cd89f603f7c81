"""Packing: every sample once, losses at their positions, equal counts for every rank."""

import pytest
import torch

from rlad_megatron.data.packing import assign_microbatches, pack
from rlad_megatron.parallel.lengths import padded_length
from rlad_megatron.types import Sample


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[], [5], [700], [3, 90, 20, 41, 100, 7, 64, 64, 1], [100] * 7])
def test_plan_places_every_sample_once(lengths, dp_size):
    ranks = assign_microbatches(lengths, 100, dp_size)
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) >= 1
    placed = sorted(i for rank in ranks for members in rank for i in members)
    assert placed == list(range(len(lengths)))
    for members in (members for rank in ranks for members in rank):
        assert sum(lengths[i] for i in members) <= 100 or len(members) == 1


def make_sample(prompt, response, seed):
    generator = torch.Generator().manual_seed(seed)
    return Sample(
        tokens=torch.randint(1, 50, (prompt + response,), generator=generator),
        prompt_length=prompt,
        weight=torch.full((response,), 0.1 * seed),
        advantage=float(seed),
        sampler_log_probs=torch.rand(response, generator=generator),
    )


def test_losses_stand_at_the_position_before_their_token():
    samples = [make_sample(4, 3, 1), make_sample(1, 5, 2), make_sample(6, 2, 3)]
    (microbatch,) = pack(samples, budget_tokens=64, multiple=16, dp_rank=0, dp_size=1)
    assert microbatch.tokens.shape == (1, 32)  # 21 tokens, rounded up
    assert microbatch.segment_starts.tolist()[-1] == 32
    at = 0
    for start, i in zip(microbatch.segment_starts.tolist(), microbatch.samples, strict=False):
        sample, count = samples[i], samples[i].response_length
        positions = microbatch.loss_positions[at : at + count]
        assert torch.equal(microbatch.tokens[0, positions + 1], sample.tokens[sample.prompt_length :])
        assert torch.equal(microbatch.targets[at : at + count], sample.tokens[sample.prompt_length :])
        assert positions[0] == start + sample.prompt_length - 1
        assert torch.equal(microbatch.per_token.weight[at : at + count], sample.weight)
        assert (microbatch.per_token.advantage[at : at + count] == sample.advantage).all()
        assert torch.equal(microbatch.per_token.sampler_log_probs[at : at + count], sample.sampler_log_probs)
        length = sample.tokens.numel()
        assert torch.equal(microbatch.positions[0, start : start + length], torch.arange(length))
        at += count
    assert at == microbatch.loss_positions.numel()
    assert microbatch.per_token.teacher_log_probs is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_tokens_keep_their_experts_and_others_go_to_the_first_ones(dtype):
    samples = [make_sample(4, 3, 1), make_sample(1, 5, 2), make_sample(6, 2, 3)]
    for sample in samples:
        scores = torch.rand(sample.tokens.numel() - 1, 5, 9)
        sample.experts = scores.argsort(dim=-1)[..., :3].to(dtype)
    arguments = {"budget_tokens": 64, "multiple": 16, "dp_size": 2}
    first, second = (pack(samples[:1], dp_rank=rank, **arguments) for rank in range(2))
    (microbatch,) = pack(samples, dp_rank=0, **arguments | {"dp_size": 1})
    unread = torch.arange(3).expand(5, 3)
    for part in (*first, *second, microbatch):
        assert part.experts.shape == (part.tokens.numel(), 5, 3) and part.experts.dtype == dtype
        expected = unread.repeat(part.tokens.numel(), 1, 1)
        for start, i in zip(part.segment_starts.tolist(), part.samples, strict=False):
            expected[start : start + samples[i].tokens.numel() - 1] = samples[i].experts.long()
        assert torch.equal(part.experts.long(), expected)
    (without,) = pack([make_sample(4, 3, 1)], dp_rank=0, **arguments)
    assert without.experts is None


def test_every_microbatch_has_its_own_length():
    samples = [make_sample(2, length, 1) for length in (3, 30, 9, 14, 50)]
    parts = [pack(samples, budget_tokens=40, multiple=8, dp_rank=rank, dp_size=2) for rank in range(2)]
    lengths = [[microbatch.tokens.shape[1] for microbatch in rank] for rank in parts]
    assert lengths == [[32, 32], [56, 8]]  # of 32 and 16 + 11 tokens, and of 52 and 5


@pytest.mark.parametrize(
    ("tokens", "multiple", "padded"),
    [
        (0, 16, 16),
        (5, 16, 16),
        (8192, 16, 8192),
        (8193, 16, 9216),
        (9216, 16, 9216),
        (8193, 96, 8448),
        (8193, 4096, 12288),
    ],
)
def test_long_microbatches_have_few_lengths(tokens, multiple, padded):
    """8,448 is 8 times 1,056, the first multiple of 96 from 1,024 on."""
    samples = [make_sample(1, tokens - 1, 1)] if tokens else []
    (microbatch,) = pack(samples, budget_tokens=64, multiple=multiple, dp_rank=0, dp_size=1)
    assert microbatch.tokens.numel() == padded_length(tokens, multiple) == padded


# Samples, data-parallel ranks, longest sample.
@pytest.mark.parametrize("count, dp_size, longest", [(64, 4, 30_000), (128, 4, 16_000), (128, 32, 30_000)])
def test_no_rank_computes_much_more_than_its_share(count, dp_size, longest):
    """Holds for every pipeline size: packing does not depend on it."""
    generator = torch.Generator().manual_seed(5)
    lengths = (500 * (longest / 500) ** torch.rand(count, generator=generator)).long().tolist()
    samples = [make_sample(1, length - 1, 1) for length in lengths]
    ranks = [pack(samples, budget_tokens=8192, multiple=16, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    busiest = max(sum(microbatch.tokens.numel() for microbatch in rank) for rank in ranks)
    assert busiest <= 1.1 * sum(lengths) / dp_size


def test_microbatches_of_a_rank_have_similar_lengths_and_the_longest_is_first():
    lengths = [90, 70, 60, 50, 40, 40, 30, 10, 10]
    (microbatches,) = assign_microbatches(lengths, 100, 1)
    totals = [sum(lengths[i] for i in members) for members in microbatches]
    assert totals == sorted(totals, reverse=True)
    assert len(totals) == 4 and totals[0] - totals[-1] <= 10
