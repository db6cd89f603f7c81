"""The shard plan of every family x layout: its slices tile each tensor exactly once, in both directions."""

import numpy as np
import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from rlad_megatron.config import LayoutConfig
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.registry import as_model_spec
from rlad_megatron.models.shard_plan import build_shard_plan, check_server_layout, layers_per_stage

AWKWARD = {
    "hidden_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "intermediate_size": 176,
    "vocab_size": 1003,
}
FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}
OWN = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
}
LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3, 7)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_slices_tile_each_tensor_once(family, tp, pp, tied):
    config = FAMILIES[family](**AWKWARD, **OWN.get(family, {}), tie_word_embeddings=tied)
    plan = build_shard_plan(config, LayoutConfig(tp, pp))
    written = {name: np.zeros(shape, dtype=np.int8) for name, shape in plan.hf_shapes.items()}
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            names = [entry.name for entry in plan.entries(tp_rank=tp_rank, pp_rank=pp_rank)]
            assert len(names) == len(set(names))
            for entry in plan.entries(tp_rank=tp_rank, pp_rank=pp_rank):
                covered = np.zeros(entry.shape, dtype=np.int8)
                for piece in entry.pieces:
                    assert piece.hf_slices.sizes == piece.local_slices.sizes
                    covered[piece.local_slices.slices] += 1
                    if entry.owner:
                        written[piece.hf_name][piece.hf_slices.slices] += 1
                assert covered.max(initial=0) <= 1
                if "word_embeddings" not in entry.name and "output_layer" not in entry.name:
                    assert covered.min() == 1  # only the vocabulary is padded
    for name, count in written.items():
        assert (count == 1).all(), name
    assert ("lm_head.weight" in plan.hf_shapes) == (not tied)


def test_layers_per_stage_fills_every_stage():
    for layers in range(1, 40):
        for stages in range(1, layers + 1):
            counts = layers_per_stage(layers, stages)
            assert sum(counts) == layers and len(counts) == stages and min(counts) >= 1
            assert len(set(counts[1:-1])) <= 1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (LayoutConfig(3, 1), "tensor_parallel=3"),
        (LayoutConfig(8, 1), "key-value heads"),
        (LayoutConfig(1, 8), "7 layers"),
    ],
)
def test_layout_that_cannot_be(layout, message):
    with pytest.raises(ConfigError, match=message):
        build_shard_plan(Qwen3Config(**AWKWARD), layout)


def test_unknown_family_lists_the_known():
    config = Qwen3Config(**AWKWARD)
    config.model_type = "mamba"
    with pytest.raises(ConfigError, match="llama, mistral, qwen2, qwen3, qwen3_moe"):
        build_shard_plan(config, LayoutConfig())


def test_uncovered_option_is_refused():
    with pytest.raises(ConfigError, match="attention_bias"):
        build_shard_plan(Qwen3Config(**AWKWARD, attention_bias=True), LayoutConfig())


def test_a_servers_size_is_a_divisor_or_a_multiple_of_the_key_value_heads():
    heads = {"num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 120}
    spec = as_model_spec(LlamaConfig(**AWKWARD | heads))
    for size in (1, 2, 3, 6, 12):
        check_server_layout(spec, size)
    with pytest.raises(
        ConfigError, match="tensor_parallel=4 neither divides the 6 key-value .*; use 1, 2, 3, 6 or 12$"
    ):
        check_server_layout(spec, 4)
