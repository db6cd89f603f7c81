"""Tests of what differs on a GPU. What a CPU can do too, it does here as well: no test body is first run on a GPU."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
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
