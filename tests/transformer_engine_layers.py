"""Transformer Engine's layers on a machine without a GPU: they can be made, filled and saved there, and not run."""

import contextlib
from unittest import mock

import torch

try:
    import transformer_engine.pytorch  # noqa: F401
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True


@contextlib.contextmanager
def made_without_gpu():
    """They ask for CUDA when they are made, and need nothing of it if their device is the CPU."""
    from rlad_megatron import platform

    with contextlib.ExitStack() as stack:
        if INSTALLED and not platform.has_cuda():
            stack.enter_context(mock.patch.object(platform, "has_cuda", return_value=False))
            stack.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=True))
        yield
