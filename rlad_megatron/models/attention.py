"""Core attention over packed sequences for Megatron's local layers.

Megatron's `DotProductAttention` takes no packed sequences and holds T x T scores for every head. Transformer Engine's
attention takes them but needs CUDA. This one has their interface and runs wherever torch does.

Shape letters: T tokens of a packed sequence, S segments, heads and groups of this rank, D head size.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention(MegatronModule):
    """Causal attention within each segment by torch's fused kernels. No dropout; memory is linear in T."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_: object) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0.0
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(D)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        attn_mask_type=None,
        attention_bias: None = None,
        *,
        packed_seq_params: PackedSeqParams,
    ) -> torch.Tensor:
        """query [T, heads, D], key and value [T, groups, D] -> [T, heads * D].

        packed_seq_params: `cu_seqlens_q`, int [S + 1], is on the CPU, so that reading it waits for no device.
        """
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        # enable_gqa is not used: without it every device and dtype has a kernel that holds no T x T scores.
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        # [T, heads, D] -> [1, heads, T, D], cut into segments
        parts = zip(
            *(tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value)), strict=True
        )
        attended = [
            scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale) for q, k, v in parts
        ]
        return torch.cat([part[0].transpose(0, 1) for part in attended]).flatten(1)
