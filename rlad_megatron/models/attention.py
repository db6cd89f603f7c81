"""Core attention over packed sequences for Megatron's local layers.

Megatron's `DotProductAttention` takes no packed sequences and holds T x T scores for every head. Transformer Engine's
attention takes them but needs CUDA. This one has their interface and runs wherever torch does.

Shape letters: T tokens of a packed sequence, S segments, P places of all batches of segments, B segments of a batch, L
tokens of its longest, heads and groups of this rank, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

PADDING_SHARE = 8  # at most one in this many places of a batch of segments is padding


@dataclass(frozen=True)
class SegmentBatches:
    """Segments of about the same length in batches, so that one call attends for many.

    Each batch is a row of B x L places, padded at the segments' ends. A causal mask hides the padding.
    """

    shapes: list[tuple[int, int]]  # (B, L) of each batch
    token_P: torch.Tensor  # int64, the token at each place; T for padding
    place_T: torch.Tensor  # int64, the place of each token


@dataclass
class LocalSeqParams(PackedSeqParams):
    """Megatron's parameters of a packed sequence, and what `PackedAttention` needs."""

    batches: SegmentBatches | None = None


def segment_batches(segment_starts: torch.Tensor, device: torch.device) -> SegmentBatches:
    """segment_starts: int [S + 1], on the CPU."""
    starts = segment_starts.tolist()
    lengths = segment_starts.diff().tolist()
    batches: list[list[int]] = []
    for segment in sorted(range(len(lengths)), key=lambda segment: -lengths[segment]):
        longest = lengths[batches[-1][0]] if batches else 0
        if (longest - lengths[segment]) * PADDING_SHARE > longest or not batches:
            batches.append([])
        batches[-1].append(segment)
    shapes = [(len(batch), lengths[batch[0]]) for batch in batches]
    tokens = []
    for batch, (_, longest) in zip(batches, shapes, strict=True):
        offset_L = torch.arange(longest)
        start_B1, length_B1 = (torch.tensor([of[segment] for segment in batch])[:, None] for of in (starts, lengths))
        tokens.append((start_B1 + offset_L).where(offset_L < length_B1, starts[-1]).flatten())
    token_P = torch.cat(tokens)
    place_T = token_P.argsort()[: starts[-1]]
    return SegmentBatches(shapes, *(index.to(device, non_blocking=True) for index in (token_P, place_T)))


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
        packed_seq_params: LocalSeqParams,
    ) -> torch.Tensor:
        """query [T, heads, D], key and value [T, groups, D] -> [T, heads * D]."""
        batches = packed_seq_params.batches
        assert batches is not None
        # enable_gqa is not used: without it every device and dtype has a kernel that holds no T x T scores.
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        sizes = [segments * longest for segments, longest in batches.shapes]
        padded = (_Rows.apply(tensor, batches.token_P, batches.place_T).split(sizes) for tensor in (query, key, value))
        attended = []
        for parts, shape in zip(zip(*padded, strict=True), batches.shapes, strict=True):
            q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)  # [B, heads, L, D]
            result = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
            attended.append(result.transpose(1, 2).flatten(0, 1))
        return _Rows.apply(torch.cat(attended), batches.place_T, batches.token_P).flatten(1)


class _Rows(torch.autograd.Function):
    """Rows in another order. A row number beyond the end is a row of zeros.

    `back` undoes `rows`. Autograd's own backward of indexing adds row by row on CPUs.
    """

    @staticmethod
    def forward(ctx, x, rows, back):
        ctx.save_for_backward(rows, back)
        return _rows(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        _, back = ctx.saved_tensors
        return _rows(upstream, back), None, None


def _rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if len(rows) > len(x):  # only then is there padding
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return x.index_select(0, rows)
