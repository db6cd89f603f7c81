"""`vocab_parallel_log_probs` on one process, against a dense float64 oracle. Several ranks: tests/multiproc."""

import pytest
import torch

from rlad_megatron.parallel.vocab_logprobs import vocab_parallel_log_probs, vocab_parallel_log_probs_and_entropy

VOCAB, PADDED, T = 1003, 1024, 37


def make_logits(scale=3.0, dtype=torch.float32, pad=float("nan")):
    """Logits whose padded columns hold something that would be seen if it were read."""
    generator = torch.Generator().manual_seed(0)
    logits_TV = (torch.randn(T, PADDED, generator=generator) * scale).to(dtype)
    logits_TV[:, VOCAB:] = pad
    target_T = torch.randint(0, VOCAB, (T,), generator=generator)
    target_T[:2] = torch.tensor([0, VOCAB - 1])
    return logits_TV, target_T, torch.randn(T, generator=generator)


def oracle(logits_TV, target_T, upstream_T, temperature):
    dense_TV = logits_TV[:, :VOCAB].double().requires_grad_()
    log_probs_TV = torch.log_softmax(dense_TV / temperature, dim=-1)
    log_probs_T = log_probs_TV.gather(1, target_T[:, None])[:, 0]
    (gradient_TV,) = torch.autograd.grad(log_probs_T, dense_TV, upstream_T.double())
    return log_probs_T.detach(), gradient_TV


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("scale", "dtype"), [(3.0, torch.float32), (1e4, torch.float32), (3.0, torch.bfloat16)])
def test_matches_float64(scale, dtype, temperature):
    logits_TV, target_T, upstream_T = make_logits(scale, dtype)
    want_T, want_gradient_TV = oracle(logits_TV, target_T, upstream_T, temperature)
    before = logits_TV.clone()
    logits_TV.requires_grad_()
    got_T = vocab_parallel_log_probs(logits_TV, target_T, vocab_size=VOCAB, temperature=temperature)
    got_T.backward(upstream_T)

    assert got_T.dtype == torch.float32 and logits_TV.grad.dtype == dtype
    assert torch.equal(logits_TV.detach().nan_to_num(), before.nan_to_num()), "the logits were modified"
    torch.testing.assert_close(got_T.double(), want_T, rtol=1e-6, atol=2e-6)
    tolerance = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(logits_TV.grad[:, :VOCAB].double(), want_gradient_TV, **tolerance)
    assert torch.all(logits_TV.grad[:, VOCAB:] == 0)


@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_entropy_and_its_gradient_match_float64(scale, monkeypatch):
    monkeypatch.setattr("rlad_megatron.parallel.vocab_logprobs._ROWS", 5)  # several blocks
    logits_TV, target_T, upstream_T = make_logits(scale)
    logits_TV[3, 7] = float("-inf")
    dense_TV = logits_TV[:, :VOCAB].double().requires_grad_()
    want_TV = torch.log_softmax(dense_TV / 0.7, dim=-1)
    want_T = torch.special.entr(want_TV.exp()).sum(-1)
    picked_T = want_TV.gather(1, target_T[:, None])[:, 0]
    (upstream_T.double() * (want_T + 2 * picked_T)).sum().backward()
    logits_TV.requires_grad_()
    got_T, entropy_T = vocab_parallel_log_probs_and_entropy(logits_TV, target_T, vocab_size=VOCAB, temperature=0.7)
    (upstream_T * (entropy_T + 2 * got_T)).sum().backward()
    torch.testing.assert_close(entropy_T.double(), want_T, rtol=1e-5, atol=1e-5)
    finite = dense_TV.grad.isfinite()  # entr's derivative at 0 is not
    torch.testing.assert_close(logits_TV.grad[:, :VOCAB].double()[finite], dense_TV.grad[finite], rtol=1e-4, atol=1e-5)
    assert torch.all(logits_TV.grad[:, VOCAB:] == 0) and logits_TV.grad.isfinite().all()


def test_extreme_logits_stay_finite():
    logits_TV = torch.full((4, 8), -1e4)
    logits_TV[:, 5:] = 1e4  # padding
    logits_TV[torch.arange(4), torch.tensor([0, 1, 2, 0])] = 1e4
    logits_TV[3, 4] = float("-inf")  # a token that the model forbids
    logits_TV.requires_grad_()
    target_T = torch.tensor([0, 1, 0, 0])
    got_T = vocab_parallel_log_probs(logits_TV, target_T, vocab_size=5)
    got_T.sum().backward()
    assert got_T.tolist() == [0.0, 0.0, -2e4, 0.0]
    assert logits_TV.grad[2].tolist() == [1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert torch.isfinite(logits_TV.grad).all()


def test_non_finite_upstream_leaves_padding_at_zero():
    logits_TV, target_T, upstream_T = make_logits()
    logits_TV.requires_grad_()
    upstream_T[0] = float("inf")
    vocab_parallel_log_probs(logits_TV, target_T, vocab_size=VOCAB).backward(upstream_T)
    assert torch.all(logits_TV.grad[:, VOCAB:] == 0)
    assert not torch.isfinite(logits_TV.grad[0, :VOCAB]).all(), "a non-finite gradient must stay visible"


def test_second_backward_is_refused():
    logits_TV, target_T, upstream_T = make_logits()
    got_T = vocab_parallel_log_probs(logits_TV.requires_grad_(), target_T, vocab_size=VOCAB)
    got_T.backward(upstream_T, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got_T.backward(upstream_T)


def test_no_positions():
    logits_TV = torch.zeros(0, 8, requires_grad=True)
    got_T = vocab_parallel_log_probs(logits_TV, torch.zeros(0, dtype=torch.int64), vocab_size=5)
    got_T.sum().backward()
    assert got_T.shape == (0,) and logits_TV.grad.shape == (0, 8)


def test_non_contiguous_logits():
    """Megatron's logits are [sequence, batch, V']: a transposed view must do."""
    logits_TV, target_T, upstream_T = make_logits()
    view_TV = logits_TV.t().contiguous().t().requires_grad_()
    got_T = vocab_parallel_log_probs(view_TV, target_T, vocab_size=VOCAB)
    got_T.backward(upstream_T)
    want_T, want_gradient_TV = oracle(logits_TV, target_T, upstream_T, 1.0)
    torch.testing.assert_close(got_T.double(), want_T, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(view_TV.grad[:, :VOCAB].double(), want_gradient_TV, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_T": torch.tensor([0, 5])}, r"target_T must be in \[0, 5\)"),
        ({"target_T": torch.tensor([-1, 0])}, r"target_T must be in \[0, 5\)"),
        ({"target_T": torch.tensor([0])}, "target_T must be int64 of shape"),
        ({"target_T": torch.tensor([0, 1], dtype=torch.int32)}, "target_T must be int64 of shape"),
        ({"logits_TV": torch.zeros(1, 2, 8)}, "logits_TV"),
        ({"vocab_size": 9}, "vocab_size 9"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"logits_TV": torch.zeros(2, 8), "target_T": torch.tensor([0, 4]), "vocab_size": 5} | change
    logits_TV, target_T = arguments.pop("logits_TV"), arguments.pop("target_T")
    with pytest.raises(ValueError, match=message):
        vocab_parallel_log_probs(logits_TV, target_T, **arguments)
