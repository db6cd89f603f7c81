"""For all tests."""

import os

import pytest

# Before torch is loaded, and for the processes of tests too: several share a core, and a thread that spins may keep it
# from the one it waits for. (A run's ranks spin, which is faster where they have cores to themselves.)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors of tests are small: threads cost more than the work, 20 times as much on a busy machine."""
    import torch  # here, because the process that only hands out tests needs none

    torch.set_num_threads(1)
