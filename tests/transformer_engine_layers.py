"""Transformer Engine's layers on a machine without a GPU: they can be made, filled and saved there, and not run."""

import contextlib
import functools
from unittest import mock

import torch


@functools.cache
def installed():
    """Whether it can be imported. Asked only when a test runs: the import takes seconds, and fails in many ways."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def made_without_gpu():
    """They ask for CUDA when they are made, and need nothing of it if their device is the CPU."""
    from rlad_megatron import platform

    with contextlib.ExitStack() as stack:
        if installed() and not platform.has_cuda():
            stack.enter_context(mock.patch.object(platform, "has_cuda", return_value=False))
            stack.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=True))
        yield
