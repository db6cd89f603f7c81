"""Packed sequences in Megatron's layers: attention within segments, and rotation that restarts in each of them."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CLASSES, SIZES

from rlad_megatron import platform
from rlad_megatron.config import ModelConfig
from rlad_megatron.models.registry import as_model_spec
from rlad_megatron.models.rope import angles_of_tokens, rope_frequencies
from rlad_megatron.parallel.context import held_positions

STARTS = [0, 7, 8, 30, 33]
SHARED_STARTS = [0, 12, 24, 60, 72]  # what 2 or 3 context-parallel ranks can share


@pytest.fixture(scope="module")
def layers():
    """Megatron-Core's modules, imported once the process is ready for them."""
    platform.prepare()
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    from rlad_megatron.models import attention, build, forward

    return SimpleNamespace(rotate=apply_rotary_pos_emb, attention=attention, build=build, forward=forward)


def packed(layers, starts=STARTS):
    return layers.forward.packed_seq_params(torch.tensor(starts, dtype=torch.int32), "local")


def a_group(rank=0, size=1):
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def exact_attention(query, key, value, scale, starts=STARTS):
    """float64 softmax over an explicit block-diagonal causal mask of T x T."""
    length, heads, _ = query.shape
    key, value = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (key, value))
    segment = torch.bucketize(torch.arange(length), torch.tensor(starts[1:]), right=True)
    allowed = (segment[:, None] == segment[None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    probabilities = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value).flatten(1)


@pytest.mark.parametrize(("heads", "groups", "scale"), [(6, 2, None), (4, 4, 0.7), (3, 1, None)])
def test_attention_stays_within_segments_and_is_causal(layers, heads, groups, scale):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(STARTS[-1], n, 10, generator=generator, requires_grad=True) for n in (heads, groups, groups)]
    config = SimpleNamespace(attention_dropout=0.0)
    alone = SimpleNamespace(cp=a_group())
    attend = layers.attention.PackedAttention(config, 1, None, "self", softmax_scale=scale, pg_collection=alone)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = exact_attention(*exact_inputs, scale or 1 / math.sqrt(10))
    result = attend(*inputs, None, packed_seq_params=packed(layers))
    torch.testing.assert_close(result.double(), exact, atol=1e-6, rtol=0)
    upstream = torch.randn(result.shape, generator=generator)
    result.backward(upstream)
    exact.backward(upstream.double())
    for ours, theirs in zip(inputs, exact_inputs, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "heads", "groups"), [(2, 6, 2), (3, 4, 4)])
def test_attention_over_context_parallel_ranks_is_that_of_one(layers, monkeypatch, size, heads, groups):
    """All ranks in this process: the gather gets the others' tokens from the whole, and so do their gradients."""
    generator = torch.Generator().manual_seed(0)
    length, starts = SHARED_STARTS[-1], torch.tensor(SHARED_STARTS)
    whole = [torch.randn(length, n, 10, generator=generator, requires_grad=True) for n in (heads, groups, groups)]
    upstream = torch.randn(length, heads * 10, generator=generator)
    held = [held_positions(starts, rank, size) for rank in range(size)]
    shared = torch.cat([torch.stack([tensor[positions] for tensor in whole[1:]], dim=1) for positions in held])
    monkeypatch.setattr(layers.attention, "gather_from_sequence_parallel_region", lambda own, group: shared)
    exact_whole = [tensor.detach().double().requires_grad_() for tensor in whole]
    exact = exact_attention(*exact_whole, 1 / math.sqrt(10), SHARED_STARTS)
    exact.backward(upstream.double())
    for rank, positions in enumerate(held):
        groups_of_rank = SimpleNamespace(cp=a_group(rank, size))
        config = SimpleNamespace(attention_dropout=0.0)
        attend = layers.attention.PackedAttention(config, 1, None, "self", pg_collection=groups_of_rank)
        own = [tensor[positions] for tensor in whole]
        result = attend(*own, None, packed_seq_params=packed(layers, SHARED_STARTS))
        torch.testing.assert_close(result.double(), exact[positions], atol=1e-6, rtol=0)
        result.backward(upstream[positions], retain_graph=True)
    for ours, theirs in zip(whole, exact_whole, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=0)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("rope", ROPES)
def test_rotation_restarts_in_each_segment(layers, rope):
    """Megatron's thd rotation of our angles is each token's rotation by its own position."""
    spec = as_model_spec(CLASSES["qwen3"](**SIZES, rope_parameters=ROPES[rope]))
    frequencies, factor = rope_frequencies(spec)
    one_rank = a_group()
    rotary = layers.build.HfRotaryEmbedding(frequencies, spec.head_dim, one_rank)
    parameters = packed(layers)
    assert parameters.max_seqlen_q == 22
    angles = rotary(rotary.get_rotary_seq_len(None, None, None, None, parameters), packed_seq=True)

    query = torch.randn(STARTS[-1], 3, spec.head_dim, generator=torch.Generator().manual_seed(0))
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False, mrope_section=None
    )
    starts = parameters.cu_seqlens_q
    rotated = layers.rotate(query, angles_of_tokens(angles, starts), config, cu_seqlens=starts, cp_group=one_rank)

    positions = torch.cat([torch.arange(length) for length in torch.tensor(STARTS).diff().tolist()])
    turn = torch.polar(torch.ones(()).double(), positions[:, None].double() * frequencies.double())[:, None]
    half = spec.head_dim // 2
    expected = torch.complex(query[..., :half].double(), query[..., half:].double()) * turn
    torch.testing.assert_close(rotated.double(), torch.cat((expected.real, expected.imag), dim=-1), atol=1e-5, rtol=0)
    if rope == "yarn":
        model = layers.build.transformer_config(spec, ModelConfig(precision="fp32"))
        assert factor > 1.1
        assert model.softmax_scale == pytest.approx(factor**2 / math.sqrt(spec.head_dim))


def test_rotation_is_by_the_position_in_the_whole_sequence(layers):
    """Megatron's thd rotation takes the angles of the chunks that a context-parallel rank holds, as we hold them."""
    spec = as_model_spec(CLASSES["qwen3"](**SIZES))
    rotary = layers.build.HfRotaryEmbedding(rope_frequencies(spec)[0], spec.head_dim, a_group())
    starts = packed(layers, SHARED_STARTS).cu_seqlens_q
    angles = angles_of_tokens(rotary(int(starts.diff().max()), packed_seq=True), starts)
    whole = torch.randn(SHARED_STARTS[-1], 3, spec.head_dim, generator=torch.Generator().manual_seed(0))
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False, mrope_section=None
    )
    expected = layers.rotate(whole, angles, config, cu_seqlens=starts, cp_group=a_group())
    for size in (2, 3):
        for rank in range(size):
            held = held_positions(starts, rank, size)
            rotated = layers.rotate(whole[held], angles, config, cu_seqlens=starts, cp_group=a_group(rank, size))
            assert torch.equal(rotated, expected[held])


@pytest.mark.parametrize("fused", [False, True])
def test_only_plain_rotation_gets_an_angle_for_each_token(layers, monkeypatch, fused):
    longest = torch.tensor(STARTS).diff().max()
    angles = torch.arange(longest)[:, None, None, None]
    monkeypatch.setattr(layers.build.GPTModel, "_preprocess", lambda self, **inputs: ("hidden states", angles, None))
    model = layers.build.HiddenStatesModel.__new__(layers.build.HiddenStatesModel)
    model.__dict__["config"] = SimpleNamespace(apply_rope_fusion=fused)
    first, given, last = model._preprocess(input_ids=None, packed_seq_params=packed(layers))
    assert (first, last) == ("hidden states", None)
    assert len(given) == (longest if fused else STARTS[-1])


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_layers_are_told_of_the_segments(layers, impl):
    parameters = layers.forward.packed_seq_params(torch.tensor(STARTS, dtype=torch.int32), impl)
    assert parameters.qkv_format == "thd"
    assert (parameters.max_seqlen_q, parameters.max_seqlen_kv) == (22, 22)
    for starts in (parameters.cu_seqlens_q, parameters.cu_seqlens_kv):
        assert starts.dtype == torch.int32 and starts.tolist() == STARTS
        assert impl != "local" or starts.device.type == "cpu"
    spec = as_model_spec(CLASSES["qwen3"](**SIZES))
    config = layers.build.transformer_config(spec, ModelConfig(transformer_impl=impl))
    assert config.apply_rope_fusion is (impl == "transformer_engine") and config.softmax_scale is None
