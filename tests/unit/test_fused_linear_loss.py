"""`fused_linear_loss` on one process, against the path over logits and a float64 oracle. Ranks: tests/multiproc."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlad_megatron.config import OBJECTIVES, ObjectiveConfig
from rlad_megatron.objectives.trrd import trrd
from rlad_megatron.parallel.fused_linear_loss import fused_linear_log_probs, fused_linear_loss
from rlad_megatron.parallel.linear_head import LinearHead
from rlad_megatron.parallel.loss_memory import MOST_CHUNK_TOKENS, chunks_of, pick_chunk_tokens
from rlad_megatron.parallel.vocab_logprobs import vocab_parallel_log_probs_and_entropy
from rlad_megatron.trainer.loss import fused_linear_trrd, token_loss
from rlad_megatron.types import TokenBatch


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Reduces rows, and in half precision multiplies them, in several blocks, as with a real vocabulary."""
    monkeypatch.setattr("rlad_megatron.kernels.products._BLOCK_ELEMENTS", 512)
    monkeypatch.setattr("rlad_megatron.kernels.softmax_torch._CPU_ELEMENTS", 4 * VOCAB)


T, H, VOCAB, PADDED = 37, 16, 203, 256
TRRD = {"alpha": 0.5, "eps_low": 0.2, "eps_high": 0.28, "teacher_clamp": 1.0}


def make_case(dtype=torch.float32, scale=1.0):
    """hidden, weight (NaN in its padding), and the per-token tensors of a batch."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH = (torch.randn(T, H, generator=generator) * scale).to(dtype).requires_grad_()
    weight_VH = torch.randn(PADDED, H, generator=generator).to(dtype)
    weight_VH[VOCAB:] = float("nan")
    target_T = torch.randint(0, VOCAB, (T,), generator=generator)
    log_probs_T = torch.log_softmax(hidden_TH.detach().double() @ weight_VH[:VOCAB].double().t(), -1)
    log_probs_T = log_probs_T.gather(1, target_T[:, None])[:, 0].float()
    noise = torch.randn(4, T, generator=generator)
    batch = TokenBatch(
        old_log_probs=log_probs_T + 0.3 * noise[0],
        teacher_log_probs=log_probs_T + 1.5 * noise[1],
        advantage=noise[2].round(),  # both signs, and zeros
        response_mean=0.3 * noise[3],
        weight=torch.rand(T, generator=generator).where(torch.arange(T) % 5 > 0, 0.0) / T,
    )
    return hidden_TH, weight_VH.requires_grad_(), target_T, batch


def head(weight_VH, chunk_tokens=10, temperature=1.0):
    return LinearHead(weight_VH, VOCAB, None, temperature, chunk_tokens)


def token_loss_of(name, batch, entropy_weight=0.0):
    return token_loss(batch, ObjectiveConfig(name=name), entropy_weight)


def gradients(loss, hidden_TH, weight_VH):
    return torch.autograd.grad(loss, (hidden_TH, weight_VH))


def assert_near(ours, exact, tolerance):
    assert ((ours.double() - exact.double()).norm() <= tolerance * exact.double().norm()).item()


def trrd_of(case, chunk_tokens=10, **changes):
    hidden_TH, weight_VH, target_T, batch = case
    arguments = (batch.old_log_probs, batch.teacher_log_probs, batch.advantage, batch.weight)
    options = {"vocab_size": VOCAB, "chunk_tokens": chunk_tokens, **TRRD, **changes}
    return fused_linear_trrd(hidden_TH, weight_VH, target_T, *arguments, **options)


def oracle(case, temperature=1.0, **changes):
    """(loss, gradient of hidden, gradient of the real rows) in float64."""
    hidden_TH, weight_VH, target_T, batch = case
    hidden_TH = hidden_TH.detach().double().requires_grad_()
    weight_VH = weight_VH.detach()[:VOCAB].double().requires_grad_()
    log_probs = torch.log_softmax(hidden_TH @ weight_VH.t() / temperature, dim=-1).gather(1, target_T[:, None])[:, 0]
    others = (value.double() for value in (batch.old_log_probs, batch.teacher_log_probs, batch.advantage))
    surrogate, _ = trrd(log_probs, *others, **{**TRRD, **changes})
    loss = -(batch.weight.double() * surrogate).sum()
    return loss.detach(), *gradients(loss, hidden_TH, weight_VH)


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_objective_equals_the_path_over_logits(name, temperature):
    hidden_TH, weight_VH, target_T, batch = make_case()
    of_token = token_loss_of(name, batch, entropy_weight=0.3 * (temperature != 1))
    loss, stats = fused_linear_loss(hidden_TH, target_T, head(weight_VH, temperature=temperature), of_token)

    logits_TV = hidden_TH @ weight_VH.t()
    log_probs_T, entropy_T = vocab_parallel_log_probs_and_entropy(
        logits_TV, target_T, vocab_size=VOCAB, temperature=temperature
    )
    loss_T, want_stats = of_token(log_probs_T, entropy_T, slice(None))
    torch.testing.assert_close(stats.pop("log_probs"), log_probs_T.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.pop("entropy"), entropy_T.detach(), rtol=1e-5, atol=1e-5)
    assert set(stats) == set(want_stats)
    for key, value in want_stats.items():
        torch.testing.assert_close(stats[key].float(), value.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, loss_T.sum(), rtol=1e-5, atol=1e-6)
    ours = gradients(loss, hidden_TH, weight_VH)
    logits_gradient_TV = torch.autograd.grad(loss_T.sum(), logits_TV)[0]
    assert_near(ours[0], logits_gradient_TV[:, :VOCAB] @ weight_VH[:VOCAB], 1e-5)
    assert_near(ours[1], logits_gradient_TV.t() @ hidden_TH, 1e-5)
    assert torch.all(ours[1][VOCAB:] == 0)


@pytest.mark.parametrize("chunk_tokens", [1, 10, 37, 1000])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_trrd_matches_float64_for_any_chunk(chunk_tokens, alpha):
    case = make_case()
    loss, stats = trrd_of(case, chunk_tokens, alpha=alpha)
    want_loss, want_hidden, want_weight = oracle(case, alpha=alpha)
    assert stats["clipped"].any() and not stats["clipped"].all()
    assert (stats["teacher_gap"] > 1).any() and (stats["teacher_gap"] < -1).any()
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
    ours = gradients(loss, *case[:2])
    assert_near(ours[0], want_hidden, 1e-5)
    assert_near(ours[1][:VOCAB], want_weight, 1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("of_log_prob", [0.0, 0.7])
def test_the_gradient_of_the_entropy_matches_float64(of_log_prob, dtype, bound):
    hidden_TH, weight_VH, target_T, batch = make_case(dtype, scale=0.5)

    def loss_of(log_probs, entropy, tokens):
        return batch.weight[tokens] * (entropy + of_log_prob * log_probs), {}

    loss, _ = fused_linear_loss(hidden_TH, target_T, head(weight_VH, temperature=0.7), loss_of)
    exact = hidden_TH.detach().double().requires_grad_(), weight_VH.detach()[:VOCAB].double().requires_grad_()
    logits_TV = exact[0] @ exact[1].t()
    if dtype == torch.bfloat16:  # as the logits are rounded
        logits_TV = logits_TV + (logits_TV.to(dtype).double() - logits_TV).detach()
    log_probs_TV = torch.log_softmax(logits_TV / 0.7, dim=-1)
    entropy_T = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
    picked_T = log_probs_TV.gather(1, target_T[:, None])[:, 0]
    want = (batch.weight.double() * (entropy_T + of_log_prob * picked_T)).sum()
    torch.testing.assert_close(loss.double(), want.detach(), rtol=bound, atol=0)
    ours, exact = gradients(loss, hidden_TH, weight_VH), gradients(want, *exact)
    assert_near(ours[0], exact[0], bound)
    assert_near(ours[1][:VOCAB], exact[1], bound)


def test_alpha_1_is_grpo_bit_for_bit():
    hidden_TH, weight_VH, target_T, batch = make_case()
    ours, _ = trrd_of((hidden_TH, weight_VH, target_T, batch), alpha=1.0)
    grpo, _ = fused_linear_loss(hidden_TH, target_T, head(weight_VH), token_loss_of("grpo", batch))
    assert torch.equal(ours, grpo)
    for a, b in zip(gradients(ours, hidden_TH, weight_VH), gradients(grpo, hidden_TH, weight_VH), strict=True):
        assert torch.equal(a, b)


def huge_case():
    """Logits up to 1e4, of integers: they are exact in float32, and only what follows is measured."""
    hidden_TH, weight_VH, target_T, batch = make_case()
    with torch.no_grad():
        hidden_TH.copy_((hidden_TH * 60).round())
        weight_VH.copy_((weight_VH * 15).round())
    logits_TV = hidden_TH.detach() @ weight_VH.detach()[:VOCAB].t()
    assert logits_TV.max() > 1e4 and logits_TV.min() < -1e4
    return hidden_TH, weight_VH, target_T, batch, logits_TV.double()


def test_cross_entropy_of_logits_of_ten_thousand():
    hidden_TH, weight_VH, target_T, batch, logits_TV = huge_case()
    # Targets that compete with the maximum: elsewhere the gradient would be exactly the weight.
    target_T = logits_TV.topk(2).indices[torch.arange(T), torch.arange(T) % 2]
    loss, stats = fused_linear_loss(hidden_TH, target_T, head(weight_VH), token_loss_of("cross_entropy", batch))
    exact = hidden_TH.detach().double().requires_grad_(), weight_VH.detach()[:VOCAB].double().requires_grad_()
    log_probs_T = torch.log_softmax(exact[0] @ exact[1].t(), dim=-1).gather(1, target_T[:, None])[:, 0]
    want = -(batch.weight.double() * log_probs_T).sum()
    torch.testing.assert_close(stats["log_probs"].double(), log_probs_T.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=0)
    ours, exact = gradients(loss, hidden_TH, weight_VH), gradients(want, *exact)
    assert_near(ours[0], exact[0], 1e-5)
    assert_near(ours[1][:VOCAB], exact[1], 1e-5)


def test_trrd_of_logits_of_ten_thousand():
    hidden_TH, weight_VH, target_T, batch, logits_TV = huge_case()
    exact = torch.log_softmax(logits_TV, -1).gather(1, target_T[:, None])[:, 0]
    batch = replace(batch, old_log_probs=exact.float(), teacher_log_probs=exact.float() - 0.5)
    case = hidden_TH, weight_VH, target_T, batch
    loss, stats = trrd_of(case)
    want_loss, want_hidden, want_weight = oracle(case)
    torch.testing.assert_close(stats["log_probs"].double(), exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
    ours = gradients(loss, hidden_TH, weight_VH)
    assert_near(ours[0], want_hidden, 1e-3)  # old log-probs of -1e4 are float32: the ratio itself has 5e-4
    assert_near(ours[1][:VOCAB], want_weight, 1e-3)


@pytest.mark.parametrize("name", ["trrd", "cross_entropy"])
def test_bf16_is_within_rounding(name):
    """Against float64 from the same bf16 inputs: logits are rounded to bf16, their gradient is, and the results are."""
    hidden_TH, weight_VH, target_T, batch = make_case(torch.bfloat16)
    loss, stats = fused_linear_loss(hidden_TH, target_T, head(weight_VH), token_loss_of(name, batch))
    ours = gradients(loss, hidden_TH, weight_VH)
    assert [gradient.dtype for gradient in ours] == [torch.bfloat16] * 2
    double = TokenBatch(
        batch.weight.double(),
        batch.advantage.double(),
        teacher_log_probs=batch.teacher_log_probs.double(),
        old_log_probs=batch.old_log_probs.double(),
    )

    def exact(rounding):
        hidden = hidden_TH.detach().double().requires_grad_()
        weight = weight_VH.detach()[:VOCAB].double().requires_grad_()
        logits_TV = hidden @ weight.t()
        logits_TV = logits_TV + (logits_TV.to(rounding).double() - logits_TV).detach()
        log_probs_T = torch.log_softmax(logits_TV, dim=-1).gather(1, target_T[:, None])[:, 0]
        total = token_loss_of(name, double)(log_probs_T, torch.zeros(T), slice(None))[0].sum()
        return log_probs_T.detach(), total.detach(), *gradients(total, hidden, weight)

    want, rounded = exact(torch.float64), exact(torch.bfloat16)
    torch.testing.assert_close(stats["log_probs"].double(), rounded[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(loss.double(), rounded[1], rtol=1e-5, atol=1e-6)
    for gradient, of_rounded, of_exact in zip((ours[0], ours[1][:VOCAB]), rounded[2:], want[2:], strict=True):
        assert_near(gradient, of_rounded, 2**-8)
        unavoidable = ((of_rounded - of_exact).norm() / of_exact.norm()).item()
        assert_near(gradient, of_exact, unavoidable + 2**-8)
        assert unavoidable < 2**-5


@pytest.fixture
def memory_full_of_nan():
    """Memory that torch hands out without writing to it holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unwritten_memory_is_not_read(dtype, memory_full_of_nan):
    """oneDNN's half-precision products read beyond a row's end on CPUs with AMX."""
    hidden_TH, weight_VH, target_T, batch = make_case(dtype)
    loss, _ = fused_linear_loss(hidden_TH, target_T, head(weight_VH, chunk_tokens=T), token_loss_of("trrd", batch))
    assert all(gradient[:VOCAB].isfinite().all() for gradient in gradients(loss, hidden_TH, weight_VH))


def test_a_certain_token_keeps_its_gradient_in_bf16():
    """1 - p is formed in float32: in bf16 a probability above 0.998 would give no gradient at all, or a wrong one."""
    hidden_TH = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.zeros(128, 2, dtype=torch.bfloat16)
    weight_VH[3, 0] = 12.0
    linear = LinearHead(weight_VH.requires_grad_(), 128, None, 1.0, 4)
    loss, stats = fused_linear_loss(hidden_TH, torch.tensor([3]), linear, lambda log_probs, *_: (-log_probs, {}))
    rest = -torch.expm1(stats["log_probs"].double()).item()
    gradient = gradients(loss, hidden_TH, weight_VH)[1]
    assert rest < 1e-3
    assert gradient[3, 0].item() == pytest.approx(-rest, rel=2**-7)


def test_the_upstream_gradient_is_a_factor():
    case = make_case()
    plain, scaled = trrd_of(case)[0], trrd_of(case)[0]
    for once, thrice in zip(gradients(plain, *case[:2]), gradients(3 * scaled, *case[:2]), strict=True):
        torch.testing.assert_close(thrice, 3 * once)


def test_main_grad_accumulates_and_nothing_goes_to_autograd():
    hidden_TH, weight_VH, target_T, batch = make_case()
    of_token = token_loss_of("trrd", batch)
    plain, _ = fused_linear_loss(hidden_TH, target_T, head(weight_VH), of_token)
    want_hidden, want_weight = gradients(plain, hidden_TH, weight_VH)

    main_grad_VH = torch.ones(PADDED, H)
    for _ in range(2):
        loss, _ = fused_linear_loss(
            hidden_TH, target_T, head(weight_VH), of_token, main_grad_VH=main_grad_VH, gradient_scale=8.0
        )
        (8 * loss).backward()
    assert weight_VH.grad is None
    torch.testing.assert_close(main_grad_VH, 1 + 16 * want_weight)
    torch.testing.assert_close(hidden_TH.grad, 16 * want_hidden)
    loss, _ = fused_linear_loss(hidden_TH, target_T, head(weight_VH), of_token, main_grad_VH=main_grad_VH)
    with pytest.raises(RuntimeError, match="another upstream gradient than 3"):
        (3 * loss).backward()

    by_trrd_VH = torch.zeros(PADDED, H)
    trrd_of(make_case(), main_grad_VH=by_trrd_VH)
    torch.testing.assert_close(by_trrd_VH, want_weight)


def test_without_gradients_nothing_is_formed():
    hidden_TH, weight_VH, target_T, batch = make_case()
    main_grad_VH = torch.zeros(PADDED, H)
    with torch.no_grad():
        loss, _ = fused_linear_loss(
            hidden_TH, target_T, head(weight_VH), token_loss_of("trrd", batch), main_grad_VH=main_grad_VH
        )
    assert not loss.requires_grad and not main_grad_VH.any()
    frozen, _ = fused_linear_loss(
        hidden_TH.detach(),
        target_T,
        head(weight_VH.detach()),
        token_loss_of("trrd", batch),
        main_grad_VH=main_grad_VH,
    )
    assert torch.equal(frozen, loss) and not main_grad_VH.any()


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_a_gradient_that_is_not_required_is_not_formed(wanted):
    hidden_TH, weight_VH, target_T, batch = make_case()
    of_token = token_loss_of("trrd", batch)
    loss, _ = fused_linear_loss(hidden_TH, target_T, head(weight_VH), of_token)
    both = dict(zip(("hidden", "weight"), gradients(loss, hidden_TH, weight_VH), strict=True))

    (hidden_TH if wanted == "weight" else weight_VH).requires_grad_(False)
    with FlopCounterMode(display=False) as flops:
        loss, _ = fused_linear_loss(hidden_TH, target_T, head(weight_VH), of_token)
    assert flops.get_total_flops() == 2 * (2 * T * H * VOCAB)  # the logits, and one of the two others
    loss.backward()
    found = {"hidden": hidden_TH.grad, "weight": weight_VH.grad}
    assert torch.equal(found.pop(wanted), both[wanted]) and list(found.values()) == [None]

    main_grad_VH = torch.zeros(PADDED, H)
    loss, _ = fused_linear_loss(hidden_TH, target_T, head(weight_VH), of_token, main_grad_VH=main_grad_VH)
    (2 * loss if wanted == "hidden" else loss).backward()  # a frozen weight leaves the upstream gradient free
    assert torch.equal(main_grad_VH, both["weight"] if wanted == "weight" else torch.zeros(PADDED, H))


def test_masked_tokens_and_no_tokens_give_exactly_zero():
    hidden_TH, weight_VH, target_T, batch = make_case()
    loss, stats = trrd_of((hidden_TH, weight_VH, target_T, replace(batch, weight=torch.zeros(T))))
    assert loss.item() == 0 and torch.isfinite(stats["log_probs"]).all()
    assert all(torch.all(gradient == 0) for gradient in gradients(loss, hidden_TH, weight_VH))

    loss, stats = trrd_of((hidden_TH[:0], weight_VH, target_T[:0], batch[:0]))
    assert loss.item() == 0
    assert set(stats) == {"log_probs", "entropy", "ratio", "clipped", "teacher_gap", "clamped"}
    assert all(value.shape == (0,) for value in stats.values())
    loss.backward()
    assert torch.all(weight_VH.grad == 0)


@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_log_probs_and_entropy(chunk_tokens):
    hidden_TH, weight_VH, target_T, _ = make_case(scale=3.0)
    log_probs_T, entropy_T = fused_linear_log_probs(
        hidden_TH, target_T, head(weight_VH, chunk_tokens, 0.7), entropy=True
    )
    exact_TV = torch.log_softmax(hidden_TH.double() @ weight_VH[:VOCAB].double().t() / 0.7, dim=-1)
    torch.testing.assert_close(log_probs_T.double(), exact_TV.gather(1, target_T[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_T.double(), torch.special.entr(exact_TV.exp()).sum(-1), rtol=1e-5, atol=1e-6)
    again, nothing = fused_linear_log_probs(hidden_TH, target_T, head(weight_VH, chunk_tokens, 0.7))
    assert torch.equal(again, log_probs_T) and nothing is None and not again.requires_grad


def test_nan_in_hidden_states_is_a_nan_loss():
    hidden_TH, weight_VH, target_T, batch = make_case()
    with torch.no_grad():
        hidden_TH[5, 3] = float("nan")
    loss, stats = trrd_of((hidden_TH, weight_VH, target_T, batch))
    assert loss.isnan()
    assert stats["log_probs"].isnan().nonzero().tolist() == [[5]]


def bad(**changes):
    hidden_TH, weight_VH, target_T, batch = make_case()
    arguments = {
        "hidden_TH": hidden_TH,
        "weight_VH": weight_VH,
        "target_T": target_T,
        "old_T": batch.old_log_probs,
        "teacher_T": batch.teacher_log_probs,
        "advantage_T": batch.advantage,
        "weight_T": batch.weight,
        "vocab_size": VOCAB,
    }
    return fused_linear_trrd(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_TH": torch.zeros(T)}, "hidden_TH must be"),
        ({"weight_VH": torch.zeros(PADDED, H + 1)}, r"weight_VH must be .* \[V', 16\]"),
        ({"weight_VH": torch.zeros(PADDED, H, dtype=torch.bfloat16)}, "weight_VH must be torch.float32"),
        ({"weight_VH": torch.zeros(VOCAB - 1, H)}, "weight_VH of 202 rows is not the shard"),
        ({"weight_VH": torch.zeros(VOCAB, H)}, "weight_VH of 203 rows is not the shard .* has 256 rows"),
        ({"weight_VH": torch.zeros(PADDED + 128, H)}, "weight_VH of 384 rows is not the shard"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"target_T": torch.full((T,), VOCAB)}, r"target_T must be in \[0, 203\)"),
        ({"target_T": torch.full((T,), -1)}, "target_T must be in"),
        ({"target_T": torch.zeros(T, dtype=torch.int32)}, "target_T must be int64"),
        ({"target_T": torch.zeros(T + 1, dtype=torch.int64)}, "must have shape"),
        ({"old_T": torch.full((T,), float("-inf"))}, "old_T must be finite"),
        ({"teacher_T": torch.full((T,), float("nan"))}, "teacher_T must be finite"),
        ({"advantage_T": torch.zeros(T, 1)}, "advantage_T must have shape"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        bad(**changes)


def test_main_grad_of_another_dtype_is_refused():
    hidden_TH, weight_VH, target_T, batch = make_case()
    with pytest.raises(ValueError, match="main_grad_VH must be float32"):
        fused_linear_loss(
            hidden_TH,
            target_T,
            head(weight_VH),
            token_loss_of("trrd", batch),
            main_grad_VH=torch.zeros(PADDED, H, dtype=torch.bfloat16),
        )


def test_chunks_and_budget():
    for tokens, size in ((10, 3), (9, 3), (1, 8), (1000, 7)):
        parts = chunks_of(tokens, size)
        lengths = [part.stop - part.start for part in parts]
        assert sum(lengths) == tokens and max(lengths) == lengths[0] <= size
        assert max(lengths) - min(lengths) <= 1 and len(parts) == -(-tokens // size)
    assert chunks_of(0, 5) == [slice(0, 0)]
    assert pick_chunk_tokens(1, 1000, 4) == 250
    assert pick_chunk_tokens(1, 1000, 2) == 500
    assert pick_chunk_tokens(1, 10**7, 2) == 1
    assert pick_chunk_tokens(2048, 38016, 2) == MOST_CHUNK_TOKENS
