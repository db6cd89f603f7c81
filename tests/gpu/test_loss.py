"""The fused loss and its kernels on a device, against float64."""

import pytest
import torch

from rlad_megatron.kernels import softmax_kernels
from rlad_megatron.kernels.softmax_torch import NOT_HERE

TRRD = {"alpha": 0.5, "teacher_clamp": 1.0, "eps_low": 0.2, "eps_high": 0.28}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("columns", "temperature"), [(3, 1.0), (151_936, 1.0), (5_003, 0.7)])
def test_kernels(device, columns, temperature, dtype):
    kernels = softmax_kernels(device)
    if device.type == "cuda":
        assert kernels.__name__.endswith("triton"), "Triton is not installed, so torch's kernels are used"
    generator = torch.Generator().manual_seed(0)
    logits_CV = (torch.randn(5, columns, generator=generator) * 3).to(device, dtype)
    target_C = torch.tensor([0, columns - 1, NOT_HERE, columns // 2, 1], device=device)
    exact_CV = logits_CV.double()
    x_CV = (exact_CV - exact_CV.amax(1, keepdim=True)) / temperature

    stats_4C = kernels.row_stats_(logits_CV.clone(), target_C, temperature, entropy=True).double()
    assert torch.equal(stats_4C[0], exact_CV.amax(1))
    torch.testing.assert_close(stats_4C[1], x_CV.exp().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats_4C[3], (x_CV.exp() * x_CV).sum(1), rtol=1e-5, atol=1e-5)
    picked_C = exact_CV.gather(1, target_C.clamp(min=0)[:, None])[:, 0]
    assert torch.equal(stats_4C[2], picked_C.where(target_C != NOT_HERE, float("-inf")))

    buffer_CV = logits_CV.clone()
    plain_4C = kernels.row_stats_(buffer_CV, target_C, temperature, entropy=False)
    factor_C, value_C = torch.linspace(-2, 3, 5, device=device), torch.linspace(5, 6, 5, device=device)
    kernels.gradient_(buffer_CV, plain_4C, target_C, factor_C, value_C, temperature)
    want_CV = factor_C.double()[:, None] * x_CV.exp()
    rows = target_C != NOT_HERE
    want_CV[rows, target_C[rows]] = value_C.double()[rows]
    torch.testing.assert_close(buffer_CV.double(), want_CV, rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_fused_loss(device, dtype, bound):
    # Imported here: the kernels need only torch, also where nothing else is installed.
    from rlad_megatron.objectives.trrd import trrd
    from rlad_megatron.trainer.loss import fused_linear_trrd

    tokens, hidden, vocab, padded = 301, 96, 5_003, 5_120
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to(device, dtype).requires_grad_()
    weight_VH = (torch.randn(padded, hidden, generator=generator) * 0.3).to(device, dtype).requires_grad_()
    target_T = torch.randint(0, vocab, (tokens,), generator=generator).to(device)
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden_TH, weight_VH))
    log_probs_T = (exact_hidden @ exact_weight[:vocab].t()).log_softmax(-1).gather(1, target_T[:, None])[:, 0]
    # Away from the edges of clip and clamp, so that no rounding moves a token over one.
    gap_T = torch.tensor([0.2, -0.8, 3.0, -0.2, 0.8, -3.0], device=device).repeat(tokens)[:tokens]
    old_T, teacher_T = log_probs_T.detach().float(), log_probs_T.detach().float() - gap_T
    advantage_T = torch.ones(tokens, device=device)
    advantage_T[::2] = -0.5
    weight_T = torch.full((tokens,), 1 / tokens, device=device)

    surrogate_T, _ = trrd(log_probs_T, old_T.double(), teacher_T.double(), advantage_T.double(), **TRRD)
    exact = -(weight_T.double() * surrogate_T).sum()
    exact.backward()
    per_token = (target_T, old_T, teacher_T, advantage_T, weight_T)
    loss, _ = fused_linear_trrd(hidden_TH, weight_VH, *per_token, vocab_size=vocab, chunk_tokens=128, **TRRD)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=bound)
    for ours, theirs in ((hidden_TH.grad, exact_hidden.grad), (weight_VH.grad, exact_weight.grad)):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()
    assert torch.all(weight_VH.grad[vocab:] == 0)
