"""The shard plan of every family x layout: its slices tile each tensor exactly once, in both directions."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rlad_megatron.config import LayoutConfig
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.registry import as_model_spec
from rlad_megatron.models.shard_plan import (
    build_shard_plan,
    check_server_layout,
    check_student_layout,
    layers_per_stage,
    stage_chunks,
)
from rlad_megatron.parallel.place import place_of

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
    "qwen3_5_text": Qwen3_5TextConfig,
    "qwen3_5_moe_text": Qwen3_5MoeTextConfig,
}
GATED_DELTA_NETS = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "partial_rotary_factor": 0.5,
}
OWN = {
    "qwen3_5_text": GATED_DELTA_NETS,
    "qwen3_5_moe_text": GATED_DELTA_NETS
    | {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 28,
    },
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
}
LAYOUTS = [LayoutConfig(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3, 7)]
LAYOUTS += [LayoutConfig(2, 3, first_stage_layers=1), LayoutConfig(2, 2, last_stage_layers=1)]
EXPERT_LAYOUTS = [
    LayoutConfig(1, 1, expert_parallel=2),
    LayoutConfig(2, 2, expert_parallel=2),
    LayoutConfig(2, 2, expert_parallel=4, expert_tensor_parallel=1),
    LayoutConfig(1, 3, expert_parallel=2, expert_tensor_parallel=2),
]
CASES = [(family, layout) for family in sorted(FAMILIES) for layout in LAYOUTS]
CASES += [(family, layout) for family in ("qwen3_moe", "qwen3_5_moe_text") for layout in EXPERT_LAYOUTS]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_slices_tile_each_tensor_once(family, layout, tied):
    """With two copies of the model, and of the experts at least one."""
    config = FAMILIES[family](**AWKWARD, **OWN.get(family, {}), tie_word_embeddings=tied)
    plan = build_shard_plan(config, layout)
    written = {name: np.zeros(shape, dtype=np.int8) for name, shape in plan.hf_shapes.items()}
    ranks = layout.pipeline_parallel * 2 * max(layout.tensor_parallel, layout.expert_parallel)
    for rank in range(ranks):
        entries = plan.entries(place_of(rank, layout, ranks))
        assert len(entries) == len({entry.name for entry in entries})
        for entry in entries:
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
        (LayoutConfig(3, 1), "layout.tensor_parallel=3 does not divide the 8 attention heads of .*; use 1, 2 or 4$"),
        (LayoutConfig(8, 1), "key-value heads"),
        (LayoutConfig(1, 8), "layout.pipeline_parallel=8 exceeds the model's 7 layers; use at most 7$"),
        (
            LayoutConfig(1, 2, virtual_pipeline=2),
            "layout.pipeline_parallel=2, virtual_pipeline=2: 7 layers do not fill the chunks; use virtual_pipeline=1$",
        ),
        (
            LayoutConfig(1, 3, first_stage_layers=2),
            "layout.pipeline_parallel=3, first_stage_layers=2: 7 layers do not fill the chunks; use "
            "first_stage_layers=1 or pipeline_parallel=2$",
        ),
        (
            LayoutConfig(1, 2, first_stage_layers=4, last_stage_layers=4),
            "first_stage_layers=4: 7 layers do not fill the chunks; use first_stage_layers=3 or last_stage_layers=3$",
        ),
        (
            LayoutConfig(1, 3, virtual_pipeline=2),
            "layout.pipeline_parallel=3, virtual_pipeline=2: 7 layers do not fill the chunks; use virtual_pipeline=1$",
        ),
        (LayoutConfig(expert_parallel=2), "^layout.expert_parallel=2: this model has no experts; use 1$"),
        (LayoutConfig(expert_tensor_parallel=2), "^layout.expert_tensor_parallel=2: this model has no experts; use 0$"),
    ],
)
def test_layout_that_cannot_be(layout, message):
    with pytest.raises(ConfigError, match=message):
        build_shard_plan(Qwen3Config(**AWKWARD), layout)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            LayoutConfig(expert_parallel=3),
            "^layout.expert_parallel=3 does not divide the 4 experts of this model; use 1, 2 or 4$",
        ),
        (
            LayoutConfig(expert_tensor_parallel=5),
            "^layout.expert_tensor_parallel=5 does not divide the 24 feed-forward width .*; use 1, 2, 3, 4, 6, 8, .*",
        ),
    ],
)
def test_experts_that_cannot_be_dealt(layout, message):
    with pytest.raises(ConfigError, match=message):
        build_shard_plan(Qwen3MoeConfig(**AWKWARD, **OWN["qwen3_moe"]), layout)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            LayoutConfig(4),
            "^layout.tensor_parallel=4 does not divide the 6 key heads of gated delta nets .*; use 1 or 2$",
        ),
        (
            LayoutConfig(2, context_parallel=2),
            "^gated delta nets share heads out over context-parallel ranks, but layout.context_parallel=2 does not "
            "divide the 3 that tensor_parallel=2 leaves on a rank; use 1 or 3$",
        ),
    ],
)
def test_heads_of_gated_delta_nets_that_cannot_be_shared(layout, message):
    with pytest.raises(ConfigError, match=message):
        build_shard_plan(Qwen3_5TextConfig(**AWKWARD, **GATED_DELTA_NETS | {"linear_num_key_heads": 6}), layout)


def test_stages_that_chunks_need_are_not_given_up():
    with pytest.raises(ConfigError, match="6 layers do not fill .*; use virtual_pipeline=1 or pipeline_parallel=3$"):
        build_shard_plan(Qwen3Config(**AWKWARD | {"num_hidden_layers": 6}), LayoutConfig(1, 2, virtual_pipeline=2))


def test_students_that_cannot_be_trained():
    moe = as_model_spec(Qwen3MoeConfig(**AWKWARD, **OWN["qwen3_moe"]))
    with pytest.raises(
        ConfigError, match="^student.layout.tensor_parallel=2: a student with experts needs .*; or use 1$"
    ):
        check_student_layout(moe, LayoutConfig(2))
    alone = LayoutConfig(expert_tensor_parallel=2)
    said = "^student.layout.expert_tensor_parallel=2 differs from tensor_parallel=1, .*; use that, or .*=0$"
    with pytest.raises(ConfigError, match=said):
        check_student_layout(moe, alone)
    check_student_layout(moe, replace(alone, expert_parallel=2))
    check_student_layout(as_model_spec(Qwen3Config(**AWKWARD)), alone)  # refused because it has no experts


def test_chunks_of_layers_are_dealt_round_robin():
    def chunks(layers, *layout, **fields):
        return [[list(chunk) for chunk in stage] for stage in stage_chunks(layers, LayoutConfig(*layout, **fields))]

    assert chunks(8, 1, 2, virtual_pipeline=2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    uneven = chunks(8, 1, 2, virtual_pipeline=2, first_stage_layers=2)
    assert uneven == [[[0], [4]], [[1, 2, 3], [5, 6, 7]]]
    assert chunks(7, 1, 3, first_stage_layers=1) == [[[0]], [[1, 2, 3]], [[4, 5, 6]]]
    assert chunks(7, 1, 3, first_stage_layers=2, last_stage_layers=1) == [[[0, 1]], [[2, 3, 4, 5]], [[6]]]


def test_unknown_family_lists_the_known():
    config = Qwen3Config(**AWKWARD)
    config.model_type = "mamba"
    with pytest.raises(
        ConfigError,
        match="llama, mistral, qwen2, qwen3, qwen3_5, qwen3_5_moe, qwen3_5_moe_text, qwen3_5_text, qwen3_moe",
    ):
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
