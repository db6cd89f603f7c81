"""What Megatron-Core asks of "cuda" on a machine without it."""

import pytest
import torch

from rlad_megatron import platform

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without CUDA")


@pytest.fixture(autouse=True)
def prepared():
    platform.prepare()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_tensors_for_cuda_are_on_the_cpu(device):
    one = torch.ones(1)
    made = [torch.tensor([1.0], device=device), torch.zeros(1, device=device), torch.empty_like(one, device=device)]
    moved = [one.to(device), one.to(device, torch.float64), one.to(device=device), one.cuda()]
    moved += [torch.nn.Linear(1, 1).to(device).weight, torch.nn.Linear(1, 1).cuda().weight]
    assert {tensor.device for tensor in made + moved} == {torch.device("cpu")}
    assert moved[1].dtype == torch.float64


def test_operations_do_not_go_through_python():
    assert not torch.overrides._get_current_function_mode_stack()


def test_types_are_those_of_cuda():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_a_device_context_still_acts():
    """transformers makes its models in one."""
    with torch.device("meta"):
        made = [torch.empty(1), torch.tensor([1.0]), torch.zeros(1), torch.arange(3), torch.randn(1)]
        assert torch.zeros(1, device="cuda").device == torch.device("cpu")
    assert all(tensor.is_meta for tensor in made)
