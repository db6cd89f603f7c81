"""RMSNorm with its own backward, against float64 autograd of the formula and against torch's."""

from types import SimpleNamespace

import pytest
import torch

from rlad_megatron.models.norm import RmsNorm

EPS = 1e-3  # large enough to matter


def norm_and_input(shape, dtype, generator):
    norm = RmsNorm(SimpleNamespace(sequence_parallel=True), shape[-1], eps=EPS)
    norm.weight.data.copy_(torch.rand(shape[-1], generator=generator) + 0.5)
    return norm.to(dtype), (torch.randn(shape, generator=generator) * 0.1).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(33, 1, 40), (7, 3, 10), (5, 12), (0, 12)])
def test_result_and_gradients_equal_the_formula_in_float64(shape):
    generator = torch.Generator().manual_seed(0)
    norm, x = norm_and_input(shape, torch.float32, generator)
    upstream = torch.randn(shape, generator=generator)
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, norm.weight))
    exact = exact_x / (exact_x.square().mean(-1, keepdim=True) + EPS).sqrt() * exact_weight
    exact.backward(upstream.double())
    result = norm(x)
    result.backward(upstream)
    torch.testing.assert_close(result.double(), exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(norm.weight.grad.double(), exact_weight.grad, atol=1e-5, rtol=1e-6)


def test_half_precision_is_rounded_once():
    """As torch's own norm, which computes in float32."""
    norm, x = norm_and_input((64, 1, 96), torch.bfloat16, torch.Generator().manual_seed(0))
    theirs = torch.nn.functional.rms_norm(x, (96,), norm.weight, EPS)
    assert (norm(x) == theirs).float().mean() > 0.99
    upstream = torch.randn_like(theirs)
    ours, exact = (torch.autograd.grad(result, (x, norm.weight), upstream) for result in (norm(x), theirs))
    for gradient, expected in zip(ours, exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, expected, atol=0.02 * expected.abs().max().item(), rtol=0)


def test_the_weight_is_marked_for_sequence_parallelism():
    """Megatron sums the gradients of marked weights over the tensor-parallel group."""
    for marked in (True, False):
        assert RmsNorm(SimpleNamespace(sequence_parallel=marked), 8).weight.sequence_parallel is marked
