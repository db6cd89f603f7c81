"""Gated delta nets over packed sequences: Megatron-Core's module, and on a CPU torch twins of its kernels.

Megatron's module calls three functions of flash-linear-attention, which need a GPU. `use_torch_kernels` gives it
functions of the same arguments and results that run wherever torch does, segment by segment.

Source: megatron/core/ssm/gated_delta_net (0.19), fla/modules and fla/ops/gated_delta_rule. Paper: arXiv 2412.06464.

Shape letters: T tokens of a packed sequence, S segments, C channels, H value heads, K key and V value head size.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from megatron.core.ssm import gated_delta_net as megatron_module
from megatron.core.ssm.gated_delta_net import common
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch.nn.utils.rnn import pad_sequence

from rlad_megatron.platform import cpu

CHUNK = 64  # tokens that the rule computes together


class OutputNorm(torch.nn.Module):
    """RMSNorm of each head before the output gate, in float32.

    Its gain is not zero-centred, as in transformers, whatever the model's other norms are. Megatron's module has a
    zero-centred `weight` there, hence the other name. Each tensor-parallel rank applies it to its own heads, so
    backward sums its gradient over the ranks. Has the constructor that Megatron's module calls.
    """

    tp_group: torch.distributed.ProcessGroup

    def __init__(self, config, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.gain = eps, torch.nn.Parameter(torch.ones(hidden_size))

    @torch.compiler.disable  # Megatron compiles what calls it, and backward communicates
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., hidden_size]"""
        gain = copy_to_tensor_model_parallel_region(self.gain, group=self.tp_group)
        return torch.nn.functional.rms_norm(x.float(), gain.shape, gain, self.eps)


class GatedDeltaNet(megatron_module.GatedDeltaNet):
    """Megatron's, with `OutputNorm`."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.out_norm.tp_group = self.tp_group


def use_torch_kernels() -> None:
    """Let Megatron's module run without a GPU, for the lifetime of this process. Idempotent."""
    cpu.use_gated_delta_kernels(l2norm, causal_conv1d, chunk_gated_delta_rule)


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x divided by its length over the last dimension, computed in float32, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: None, *, activation: str, cu_seqlens: torch.Tensor, **_: object
) -> tuple[torch.Tensor, None]:
    """A convolution of each channel that sees the last W tokens of the segment, then SiLU.

    x [1, T, C], weight [C, W], cu_seqlens [S + 1] -> [1, T, C]
    """
    assert activation == "silu" and bias is None
    channels, width = weight.shape
    segments = x.transpose(1, 2).split(_lengths(cu_seqlens), dim=2)
    padded = (torch.nn.functional.pad(segment, (width - 1, 0)) for segment in segments)
    out = [torch.nn.functional.conv1d(segment, weight[:, None], groups=channels) for segment in padded]
    return torch.nn.functional.silu(torch.cat(out, dim=2)).transpose(1, 2), None


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule by Megatron's torch code, in float32, from a state of zeros in each segment.

    query, key [1, T, H, K], value [1, T, H, V], g (log of the decay), beta [1, T, H], cu_seqlens [S + 1]
    -> [1, T, H, V]
    """
    lengths = _lengths(cu_seqlens)
    alike: dict[int, list[int]] = defaultdict(list)  # segments by the chunks that the rule pads them to
    for segment, length in enumerate(lengths):
        alike[-(-length // CHUNK)].append(segment)
    operands = [tensor[0].split(lengths) for tensor in (query, key, value, g, beta)]
    out: list[torch.Tensor] = [value] * len(lengths)
    for segments in alike.values():
        # A padded token changes no state: its key, its strength and its decay are 0.
        q, k, v, decay, strength = (
            pad_sequence([tensors[segment] for segment in segments], batch_first=True) for tensors in operands
        )
        together, _ = common.torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=strength, chunk_size=CHUNK)
        for segment, values in zip(segments, together, strict=True):
            out[segment] = values[: lengths[segment]]
    return torch.cat(out)[None], None


def _lengths(cu_seqlens: torch.Tensor) -> list[int]:
    return cu_seqlens.diff().tolist()
