"""`vocab_parallel_log_probs` over a vocabulary cut over 2 and 4 gloo ranks, against a dense float64 oracle."""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from rlad_megatron.parallel.vocab_logprobs import vocab_parallel_log_probs

pytestmark = pytest.mark.multiproc

T = 24
# name: (vocabulary, scale of the logits, dtype, temperature)
CASES = {
    "plain": (1003, 3.0, torch.float32, 1.0),
    "temperature": (1003, 3.0, torch.float32, 0.7),
    "extreme": (1003, 1e4, torch.float32, 1.0),
    "bf16": (1003, 3.0, torch.bfloat16, 0.7),
    "ranks_of_padding_only": (5, 3.0, torch.float32, 1.0),
    "extreme_and_padding_only": (5, 1e4, torch.float32, 0.7),
}


def padded(vocab_size, tp):
    return -(-vocab_size // (128 * tp)) * 128 * tp


def make_inputs(case, tp):
    """The full logits [T, padded], with NaN in padded columns; targets that fall on every shard; upstream gradient."""
    vocab_size, scale, dtype, temperature = CASES[case]
    generator = torch.Generator().manual_seed(0)
    logits_TV = (torch.randn(T, vocab_size, generator=generator) * scale).to(dtype)
    padding = torch.full((T, padded(vocab_size, tp) - vocab_size), float("nan"), dtype=dtype)
    target_T = torch.linspace(0, vocab_size - 1, T).long()  # both ends, and an even walk over the shards
    return torch.cat([logits_TV, padding], dim=1), target_T, torch.randn(T, generator=generator), temperature


def shard_results(rank, world_size, tp):
    """All cases on this rank's shard; groups of `tp` consecutive ranks."""
    groups = [dist.new_group(list(range(start, start + tp))) for start in range(0, world_size, tp)]
    group, tp_rank = groups[rank // tp], rank % tp
    results = {}
    for case, (vocab_size, *_) in CASES.items():
        logits_TV, target_T, upstream_T, temperature = make_inputs(case, tp)
        shard_TV = logits_TV.chunk(tp, dim=1)[tp_rank].clone().requires_grad_()
        got_T = vocab_parallel_log_probs(
            shard_TV, target_T, vocab_size=vocab_size, group=group, temperature=temperature
        )
        got_T.backward(upstream_T)
        results[case] = (got_T.detach(), shard_TV.grad)
    return results


@pytest.mark.parametrize(("world_size", "tp"), [(2, 2), (4, 4), (4, 2)])
def test_matches_float64_for_every_tp(world_size, tp):
    """(4, 2): two groups of two, so that the group given is the one used."""
    by_rank = run_ranks(shard_results, world_size, tp)
    for case, (vocab_size, _, dtype, _) in CASES.items():
        logits_TV, target_T, upstream_T, temperature = make_inputs(case, tp)
        dense_TV = logits_TV[:, :vocab_size].double().requires_grad_()
        want_TV = torch.log_softmax(dense_TV / temperature, dim=-1)
        want_T = want_TV.gather(1, target_T[:, None])[:, 0]
        want_T.backward(upstream_T.double())

        for first in range(0, world_size, tp):
            ranks = by_rank[first : first + tp]
            for got_T, _ in (results[case] for results in ranks):
                assert torch.equal(got_T, ranks[0][case][0]), f"{case}: ranks disagree"
                torch.testing.assert_close(got_T.double(), want_T.detach(), rtol=1e-6, atol=2e-6, msg=case)
            gradient_TV = torch.cat([results[case][1] for results in ranks], dim=1)
            assert gradient_TV.dtype == dtype
            rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(
                gradient_TV[:, :vocab_size].double(), dense_TV.grad, rtol=rtol, atol=1e-6, msg=case
            )
            assert torch.all(gradient_TV[:, vocab_size:] == 0), f"{case}: padded columns got a gradient"


def fail_on_rank_1(rank, world_size):
    if rank == 1:
        raise KeyError("the cause")
    dist.barrier()  # would never return


def test_harness_reports_the_rank_that_failed_first():
    with pytest.raises(RuntimeError, match=r"rank 1:[\s\S]*the cause"):
        run_ranks(fail_on_rank_1, 2)
