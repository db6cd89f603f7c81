"""`fused_linear_loss` over a vocabulary cut over gloo ranks, against a dense float64 oracle on every rank."""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from rlad_megatron.objectives.trrd import trrd
from rlad_megatron.parallel.fused_linear_loss import fused_linear_log_probs, fused_linear_loss
from rlad_megatron.parallel.linear_head import LinearHead
from rlad_megatron.trainer.loss import fused_linear_trrd

pytestmark = pytest.mark.multiproc

T, H, TEMPERATURE = 24, 16, 0.7
TRRD = {"alpha": 0.5, "eps_low": 0.2, "eps_high": 0.28, "teacher_clamp": 1.0}
VOCABULARIES = (5, 1000, 50_257, 151_936)  # 5: all ranks but the first hold padding alone
LAYOUTS = (1, 2, 4)


def make_inputs(vocab_size, tp):
    """The whole padded weight with NaN padding, and the rest; targets walk over all shards."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden_TH = torch.randn(T, H, generator=generator)
    padded = -(-vocab_size // (128 * tp)) * 128 * tp
    weight_VH = torch.full((padded, H), float("nan"))
    weight_VH[:vocab_size] = torch.randn(vocab_size, H, generator=generator)
    target_T = torch.linspace(0, vocab_size - 1, T).long()
    noise_4T = torch.randn(4, T, generator=generator)
    return hidden_TH, weight_VH, target_T, noise_4T


def dense(hidden_TH, weight_VH, target_T, others, vocab_size):
    """(loss, gradient of hidden, gradient of weight) in float64, of logits that are rounded as the inputs are."""
    rounding = hidden_TH.dtype if hidden_TH.dtype != torch.float32 else torch.float64
    hidden_TH = hidden_TH.double().requires_grad_()
    weight_VH = weight_VH[:vocab_size].double().requires_grad_()
    logits_TV = hidden_TH @ weight_VH.t()
    logits_TV = logits_TV + (logits_TV.to(rounding).double() - logits_TV).detach()
    log_probs = torch.log_softmax(logits_TV / TEMPERATURE, dim=-1).gather(1, target_T[:, None])[:, 0]
    old, teacher, advantage, weight = (value.double() for value in others)
    surrogate, _ = trrd(log_probs, old, teacher, advantage, **TRRD)
    loss = -(weight * surrogate).sum()
    return loss.detach(), *torch.autograd.grad(loss, (hidden_TH, weight_VH))


def error(ours, exact):
    """(squared norm of the difference, squared norm), which add up over shards."""
    return (ours.double() - exact).square().sum().item(), exact.square().sum().item()


def compare(vocab_size, tp, group, tp_rank, dtype=torch.float32):
    hidden_TH, whole_VH, target_T, noise_4T = make_inputs(vocab_size, tp)
    hidden_TH, whole_VH = hidden_TH.to(dtype), whole_VH.to(dtype)
    shard_VH = whole_VH.chunk(tp)[tp_rank].clone().requires_grad_()
    hidden_TH.requires_grad_()
    head = LinearHead(shard_VH, vocab_size, group, TEMPERATURE, 7)
    log_probs_T, entropy_T = fused_linear_log_probs(hidden_TH, target_T, head, entropy=True)
    others = (log_probs_T + 0.3 * noise_4T[0], log_probs_T + 1.5 * noise_4T[1], noise_4T[2], noise_4T[3].abs() / T)
    loss, stats = fused_linear_trrd(
        hidden_TH,
        shard_VH,
        target_T,
        *others,
        vocab_size=vocab_size,
        group=group,
        temperature=TEMPERATURE,
        chunk_tokens=7,
        **TRRD,
    )
    loss.backward()

    want_loss, want_hidden, want_weight = dense(hidden_TH.detach(), whole_VH, target_T, others, vocab_size)
    start = tp_rank * shard_VH.shape[0]
    want_shard = torch.zeros_like(shard_VH, dtype=torch.float64)
    part = want_weight[start : start + shard_VH.shape[0]]
    want_shard[: part.shape[0]] = part
    exact_TV = torch.log_softmax(hidden_TH.detach().double() @ whole_VH[:vocab_size].double().t() / TEMPERATURE, dim=-1)
    return {
        "loss": abs(loss.item() - want_loss.item()) / abs(want_loss.item()),
        "hidden": error(hidden_TH.grad, want_hidden),
        "weight": error(shard_VH.grad, want_shard),
        "padding": shard_VH.grad[part.shape[0] :].abs().sum().item(),
        "log_probs": (log_probs_T - exact_TV.gather(1, target_T[:, None])[:, 0]).abs().max().item(),
        "entropy_in_the_loss": (stats["entropy"] - entropy_T).abs().max().item(),
        "entropy": (entropy_T - torch.special.entr(exact_TV.exp()).sum(-1)).abs().max().item(),
        "same": (loss.item(), stats["log_probs"].sum().item(), hidden_TH.grad.sum().item()),
    }


def sequence_and_data_parallel(rank, group, tp_rank):
    """Tokens cut over two pairs of ranks, as by data or context parallelism, and hidden states within a pair."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    vocab_size = 1000
    hidden_TH, whole_VH, target_T, noise_4T = make_inputs(vocab_size, 2)
    others = (noise_4T[0] - 5, noise_4T[1] - 5, noise_4T[2], noise_4T[3].abs() / T)
    old_T, teacher_T, advantage_T, weight_T = others
    mine = slice(0, 12) if rank < 2 else slice(12, 24)
    local = hidden_TH[mine].chunk(2)[tp_rank].clone().requires_grad_()
    shard_VH = whole_VH.chunk(2)[tp_rank].clone().requires_grad_()

    def token_loss(log_probs, entropy, tokens):
        values = (value[mine][tokens] for value in (old_T, teacher_T, advantage_T))
        surrogate, stats = trrd(log_probs, *values, **TRRD)
        return -weight_T[mine][tokens] * surrogate, stats

    gathered = gather_from_sequence_parallel_region(local, group=group)
    head = LinearHead(shard_VH, vocab_size, group, TEMPERATURE, 5)
    loss, _ = fused_linear_loss(gathered, target_T[mine], head, token_loss, reduce_hidden_grad=False)
    loss.backward()

    want_loss, want_hidden, want_weight = dense(hidden_TH, whole_VH, target_T, others, vocab_size)
    totals = [loss.detach(), shard_VH.grad]
    for total in totals:  # over the two pairs, as the gradient buffers are summed
        dist.all_reduce(total, group=_across[rank % 2])
    start = tp_rank * shard_VH.shape[0]
    part = want_weight[start : start + shard_VH.shape[0]]
    return {
        "loss": abs(totals[0].item() - want_loss.item()) / abs(want_loss.item()),
        "hidden": error(local.grad, want_hidden[mine].chunk(2)[tp_rank]),
        "weight": error(totals[1][: part.shape[0]], part),
    }


_across = []


def all_cases(rank, world_size):
    from rlad_megatron import platform

    platform.setup()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    _across.extend([dist.new_group([0, 2]), dist.new_group([1, 3])])
    groups = {1: None, 2: pairs[rank // 2], 4: dist.group.WORLD}
    results = {
        (vocab_size, tp): compare(vocab_size, tp, groups[tp], rank % tp)
        for vocab_size in VOCABULARIES
        for tp in LAYOUTS
    }
    for tp in LAYOUTS:
        results["bf16", tp] = compare(1000, tp, groups[tp], rank % tp, torch.bfloat16)
    results["sequence_parallel"] = sequence_and_data_parallel(rank, pairs[rank // 2], rank % 2)

    # A NaN on one rank's hidden states (a broken rank) must not make the others wait.
    hidden_TH, whole_VH, target_T, _ = make_inputs(1000, 4)
    if rank == 2:
        hidden_TH[3] = float("nan")
    shard_VH = whole_VH.chunk(4)[rank].requires_grad_()
    head = LinearHead(shard_VH, 1000, dist.group.WORLD, 1.0, 5)
    scored = fused_linear_log_probs(hidden_TH, target_T, head)[0].isnan().nonzero().tolist()
    loss, stats = fused_linear_loss(hidden_TH.requires_grad_(), target_T, head, lambda log_probs, *_: (-log_probs, {}))
    loss.backward()
    results["nan"] = scored, stats["log_probs"].isnan().nonzero().tolist(), loss.isnan().item()
    return results


@pytest.fixture(scope="module")
def by_rank():
    return run_ranks(all_cases, 4)


def on_eight_ranks(rank, world_size):
    from rlad_megatron import platform

    platform.setup()
    return {(vocab_size, 8): compare(vocab_size, 8, dist.group.WORLD, rank) for vocab_size in (5, 50_257)}


@pytest.fixture(scope="module")
def by_rank_of_8():
    return run_ranks(on_eight_ranks, 8)


def relative(by_rank, case, name, ranks):
    differences, norms = zip(*(by_rank[rank][case][name] for rank in ranks), strict=True)
    return (sum(differences) / sum(norms)) ** 0.5


def assert_matches_float64(by_rank, vocab_size, tp):
    case = (vocab_size, tp)
    for first in range(0, len(by_rank), tp):
        ranks = range(first, first + tp)
        for rank in ranks:
            result = by_rank[rank][case]
            assert result["loss"] < 1e-5
            assert result["log_probs"] < 1e-5 and result["entropy"] < 1e-4
            assert result["padding"] == 0 and result["entropy_in_the_loss"] < 1e-5
            assert result["same"] == by_rank[first][case]["same"], "ranks of a group disagree"
        assert relative(by_rank, case, "hidden", ranks) < 1e-5
        assert relative(by_rank, case, "weight", ranks) < 1e-5


@pytest.mark.parametrize("tp", LAYOUTS)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_matches_float64(by_rank, vocab_size, tp):
    assert_matches_float64(by_rank, vocab_size, tp)


@pytest.mark.parametrize("vocab_size", [5, 50_257])
def test_eight_ranks_match_float64(by_rank_of_8, vocab_size):
    assert_matches_float64(by_rank_of_8, vocab_size, 8)


@pytest.mark.parametrize("tp", LAYOUTS)
def test_bf16_in_several_chunks_is_within_rounding(by_rank, tp):
    """What is left after the rounding of logits: that of their gradient, of the results, and of sums over ranks."""
    case = ("bf16", tp)
    for first in range(0, 4, tp):
        ranks = range(first, first + tp)
        for rank in ranks:
            result = by_rank[rank][case]
            assert result["loss"] < 1e-5 and result["padding"] == 0
            assert result["same"] == by_rank[first][case]["same"], "ranks of a group disagree"
        sums = 1 if tp == 1 else 2  # each rank's share of the hidden states' gradient is rounded before they are summed
        assert relative(by_rank, case, "hidden", ranks) < sums * 2**-8
        assert relative(by_rank, case, "weight", ranks) < 2**-8


def test_sequence_parallel_hidden_states_and_tokens_cut_over_ranks(by_rank):
    assert relative(by_rank, "sequence_parallel", "hidden", range(4)) < 1e-5
    assert relative(by_rank, "sequence_parallel", "weight", range(4)) < 1e-5
    assert all(result["sequence_parallel"]["loss"] < 1e-5 for result in by_rank)


def test_a_nan_reaches_every_rank(by_rank):
    assert [result["nan"] for result in by_rank] == [([[3]], [[3]], True)] * 4
