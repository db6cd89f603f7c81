"""Tests of what differs on a GPU. What a CPU can do too, it does here as well: no test body is first run on a GPU."""

import os

import pytest
import torch

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="module")
def groups():
    """A world of one rank, on the GPU if there is one."""
    import gpu_steps

    environment = dict(os.environ)
    yield gpu_steps.join()
    gpu_steps.leave()
    os.environ.clear()
    os.environ.update(environment)
