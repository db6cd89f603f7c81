"""RMSNorm of Megatron's local layers, wherever torch runs.

Megatron's wrapper of torch's norm has no zero-centred weights and refuses sequence parallelism.
"""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm


class RmsNorm(torch.nn.Module):
    """RMSNorm over the last dimension; with `layernorm_zero_centered_gamma` it multiplies by 1 + weight.

    Has the constructor that Megatron's layers call.
    """

    def __init__(self, config, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.zero_centered, self.eps = config.layernorm_zero_centered_gamma, eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)
        # Each rank's norms see only their shard of the tokens; Megatron sums the gradients of marked weights over the
        # tensor-parallel group (`finalize_model_grads`).
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] in x's dtype."""
        if not self.zero_centered:
            return rms_norm(x, self.weight.shape, self.weight, self.eps)
        # bf16 would lose the weight's bits beside the 1.
        return rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)
