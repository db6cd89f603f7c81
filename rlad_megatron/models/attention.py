"""Core attention over packed sequences for Megatron's local layers.

Megatron's `DotProductAttention` takes no packed sequences and holds T x T scores for every head. Transformer Engine's
attention takes them but needs CUDA. This one has their interface and runs wherever torch does.

Under context parallelism each rank has the queries of its own tokens and gathers all keys and values.

Shape letters: T tokens of a packed sequence on this rank, S segments, heads and groups of this rank, D head size.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from rlad_megatron.parallel.context import held_chunks, held_positions


class PackedAttention(MegatronModule):
    """Causal attention within each segment by torch's fused kernels. No dropout.

    Memory is linear in T. Under context parallelism it also holds a mask of each chunk's queries by their keys.
    """

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, *, pg_collection, softmax_scale=None, **_: object
    ) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0.0
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(D)
        self.cp_group = pg_collection.cp

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

        packed_seq_params: `cu_seqlens_q`, int [S + 1], is on the CPU, so that reading it waits for no device. It is of
        the whole sequence, of which this rank holds its context-parallel share (parallel/context.py).
        """
        starts, rank, size = packed_seq_params.cu_seqlens_q, self.cp_group.rank(), self.cp_group.size()
        if size > 1:
            key, value = self._gather(torch.stack((key, value), dim=1), starts).unbind(dim=1)
        # enable_gqa is not used: without it every device and dtype has a kernel that holds no T x T scores.
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))  # [1, heads, tokens, D]
        chunks = held_chunks(starts, rank, size)
        attended = []
        for q, chunk in zip(query.split([chunk.stop - chunk.start for chunk in chunks], dim=2), chunks, strict=True):
            k, v = (tensor[:, :, chunk.segment : chunk.stop] for tensor in (key, value))
            attended.append(self._attend(q, k, v)[0].transpose(0, 1))
        return torch.cat(attended).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Of the last tokens of a segment to all of it: query [1, heads, C, D], key and value [1, heads, K, D]."""
        queries, keys = query.shape[2], key.shape[2]
        if queries == keys:
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.softmax_scale)
        mask = causal_lower_right(queries, keys)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.softmax_scale)

    def _gather(self, shared: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """[T, ...] of each context-parallel rank -> [CP * T, ...] in sequence order.

        Backward sums the ranks' gradients of a token on the rank that holds it.
        """
        size = self.cp_group.size()
        held = torch.cat([held_positions(starts, rank, size) for rank in range(size)])
        gathered = gather_from_sequence_parallel_region(shared, group=self.cp_group)
        return gathered.index_select(0, held.argsort().to(gathered.device))
