"""Context parallelism: every token and every loss is on one rank, in Megatron's order, and comes back to its place."""

import pytest
import torch

from rlad_megatron.data.packing import pack
from rlad_megatron.parallel.context import held_positions, join
from rlad_megatron.types import Sample

LENGTHS = [(5, 8), (1, 1), (1, 2), (4, 4), (11, 16)]  # prompt and response; two are shorter than the chunks are many


def make_samples():
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            tokens=torch.randint(1, 90, (prompt + response,), generator=generator),
            prompt_length=prompt,
            weight=torch.rand(response, generator=generator),
            advantage=float(prompt),
            old_log_probs=-torch.rand(response, generator=generator),
            experts=torch.randint(0, 99, (prompt + response - 1, 2, 3), generator=generator).to(torch.uint8),
        )
        for prompt, response in LENGTHS
    ]


def pack_on(rank, size, budget=30):
    return pack(
        make_samples(), budget_tokens=budget, multiple=8 * size, dp_rank=0, dp_size=1, cp_rank=rank, cp_size=size
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_order_is_transformer_engines(size):
    """Its kernel finds the position of each token that a rank holds; here in its words."""
    starts = torch.tensor([0, 24, 48, 120])
    for rank in range(size):
        positions = []
        for token in range(120 // size):
            segment = int((starts // size <= token).sum()) - 1
            length = int(starts[segment + 1] - starts[segment]) // size
            index = token - int(starts[segment]) // size
            offset = rank if index < length // 2 else (size - 1) * 2 - rank
            positions.append(index + int(starts[segment]) + length // 2 * offset)
        assert held_positions(starts, rank, size).tolist() == positions


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_share_the_tokens_and_the_cost_of_attention(size):
    starts = torch.tensor([0, 24, 120])
    held = [held_positions(starts, rank, size) for rank in range(size)]
    assert torch.cat(held).sort().values.tolist() == list(range(120))
    assert len({positions.sum().item() for positions in held}) == 1


@pytest.mark.parametrize("size", [2, 3])
def test_each_loss_is_on_one_rank_with_its_own_target(size):
    samples = make_samples()
    shares = [pack_on(rank, size) for rank in range(size)]
    counted = []
    for parts in zip(*shares, strict=True):
        starts = parts[0].segment_starts
        assert starts[-1] % (8 * size) == 0 and (starts.diff() % (2 * size) == 0).all()
        for rank, part in enumerate(parts):
            assert part.tokens.shape == part.positions.shape == (1, starts[-1] // size)
            assert part.experts.shape == (starts[-1] // size, 2, 3)
            held = held_positions(starts, rank, size)
            for place, target, weight, advantage, old in zip(
                part.loss_positions,
                part.targets,
                part.per_token.weight,
                part.per_token.advantage,
                part.per_token.old_log_probs,
                strict=True,
            ):
                segment = int((starts <= held[place]).sum()) - 1
                sample, at = samples[part.samples[segment]], int(held[place] - starts[segment])
                assert part.positions[0, place] == at
                assert part.tokens[0, place] == sample.tokens[at] and target == sample.tokens[at + 1]
                assert torch.equal(part.experts[place], sample.experts[at])
                token = at + 1 - sample.prompt_length
                assert weight == sample.weight[token] and old == sample.old_log_probs[token]
                assert advantage == sample.advantage
                counted.append((part.samples[segment], token))
    assert sorted(counted) == [(i, token) for i, (_, response) in enumerate(LENGTHS) for token in range(response)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_values_of_ranks_come_back_in_order(size):
    """As the ranks' sum: each of them writes its own losses."""
    samples = make_samples()
    total = [torch.zeros(sample.response_length) for sample in samples]
    for rank in range(size):
        of_sample = [torch.zeros(sample.response_length) for sample in samples]
        for microbatch in pack_on(rank, size):
            join(microbatch.per_token.weight, microbatch, of_sample)
        total = [sum(values) for values in zip(total, of_sample, strict=True)]
    for values, sample in zip(total, samples, strict=True):
        assert torch.equal(values, sample.weight)


def test_an_empty_micro_batch_has_a_share_too():
    arguments = {"budget_tokens": 8, "multiple": 16, "dp_rank": 1, "dp_size": 2, "cp_rank": 1, "cp_size": 2}
    (empty,) = pack(make_samples()[:1], **arguments)
    assert empty.tokens.shape == (1, 8) and not empty.samples and not empty.loss_positions.numel()
    join(torch.zeros(0), empty, [])
