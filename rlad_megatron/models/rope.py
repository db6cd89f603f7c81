"""Frequencies and angles of the rotary embedding."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlad_megatron.models.spec import ModelSpec


def rope_frequencies(spec: ModelSpec) -> tuple[torch.Tensor, float]:
    """(inverse frequencies float32 [rotated_dim / 2], factor on cos and sin), as transformers computes them."""
    rope = spec.rope
    if rope.rope_type == "default":
        exponents = torch.arange(0, spec.rotated_dim, 2, dtype=torch.float32) / spec.rotated_dim
        return 1.0 / (rope.rope_theta**exponents), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = SimpleNamespace(
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        rope_parameters={
            "rope_type": rope.rope_type,
            "rope_theta": rope.rope_theta,
            "partial_rotary_factor": rope.share,
            **dict(rope.scaling),
        },
        standardize_rope_params=lambda: None,  # they are
    )
    return ROPE_INIT_FUNCTIONS[rope.rope_type](config, torch.device("cpu"))


def angles_of_tokens(angles: torch.Tensor, segment_starts: torch.Tensor) -> torch.Tensor:
    """The angles of each token of a whole packed sequence [T, ...], from those of positions 0, 1, ... [positions, ...].

    Under context parallelism too, the sequence is that of all ranks. Given as many angles as tokens, Megatron's plain
    rotation takes each token's own, in one operation; given fewer, it rotates segment by segment (0.19).

    segment_starts: int32 [S + 1] on the CPU (types.Microbatch).
    """
    return torch.cat([angles[:length] for length in segment_starts.diff().tolist()])
