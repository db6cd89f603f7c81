"""The kernels of the fused loss: softmax twins for CPU and GPU behind one signature, and matrix products."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch


def softmax_kernels(device: torch.device) -> ModuleType:
    """The Triton twin on CUDA if Triton is installed, else the torch twin.

    Each module has `row_stats_` and `gradient_`, documented in the reference, kernels/softmax_torch.py.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from rlad_megatron.kernels import softmax_triton

        return softmax_triton
    from rlad_megatron.kernels import softmax_torch

    return softmax_torch
