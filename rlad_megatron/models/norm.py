"""RMSNorm for Megatron's local layers.

Shape letters: N rows, H normalised size.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


class RmsNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the interface of Megatron's norms, and with a derivative of its own on CPUs.

    Megatron's wrapper refuses sequence parallelism, although its norms are correct under it: each rank's norms see only
    their shard of the tokens, and Megatron sums the gradients of marked weights over the tensor-parallel group
    (`finalize_model_grads`).
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H] of the same dtype; computed in float32."""
        if x.is_cuda:
            return super().forward(x)
        return _RmsNorm.apply(x, self.weight, self.eps)


class _RmsNorm(torch.autograd.Function):
    """On CPUs autograd differentiates torch's RMSNorm operation by operation. This backward is several times faster."""

    @staticmethod
    def forward(ctx, x, weight_H, eps):
        x_NH = x.float()
        norm_N1 = torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True)
        scale_N1 = norm_N1.square_().div_(x_NH.shape[-1]).add_(eps).rsqrt_()
        unit_NH = x_NH * scale_N1
        ctx.save_for_backward(unit_NH, scale_N1, weight_H)
        return (unit_NH * weight_H).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        unit_NH, scale_N1, weight_H = ctx.saved_tensors
        product_NH = upstream * unit_NH
        mean_N1 = (product_NH @ weight_H.to(product_NH.dtype))[..., None].div_(unit_NH.shape[-1])
        gradient_NH = (upstream.float() * weight_H).addcmul_(unit_NH, mean_N1, value=-1).mul_(scale_N1)
        weight_gradient_H = product_NH.flatten(0, -2).sum(dim=0)
        return gradient_NH.to(upstream.dtype), weight_gradient_H.to(weight_H.dtype), None
