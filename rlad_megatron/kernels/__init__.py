"""The fused loss's elementwise and reduction parts, as twins behind one signature (`softmax_kernels`); its products."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch


def softmax_kernels(device: torch.device) -> ModuleType:
    """The twin for tensors on `device`: Triton's on CUDA where Triton is installed, else torch's.

    Each module has `row_stats_` and `gradient_`; kernels/softmax_torch.py is the reference and says what they do.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from rlad_megatron.kernels import softmax_triton

        return softmax_triton
    from rlad_megatron.kernels import softmax_torch

    return softmax_torch
