"""The planner's bytes against real Megatron models: weights, gradients, optimizer exactly, activations within 5%."""

import pytest
import torch
from harness import run_ranks
from tiny_models import HAS_GATED_DELTA_NETS

from rlad_megatron.config import LayoutConfig

pytestmark = pytest.mark.multiproc

TOKENS = 96
# Everything a multiple of 64 elements, as in real models, but for the vocabulary.
EVEN = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
ODD = {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20}
EXPERTS = EVEN | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
DEEP = {"num_hidden_layers": 8}
# Multiples of 64 elements, as in every known model, but for the decays.
GATED_DELTA_NETS = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 64,
}
# name -> (family, sizes, tied, precision, layout), on two ranks
CASES = {
    "qwen3-dp2": ("qwen3", EVEN, True, "fp32", LayoutConfig()),
    "qwen3-dp2-bf16": ("qwen3", EVEN, False, "bf16", LayoutConfig()),
    "qwen3-tp2": ("qwen3", EVEN, False, "fp32", LayoutConfig(tensor_parallel=2)),
    "qwen3-tp2-bf16": ("qwen3", EVEN, True, "bf16", LayoutConfig(tensor_parallel=2)),
    "qwen3-tp2-sp": ("qwen3", EVEN, False, "fp32", LayoutConfig(tensor_parallel=2, sequence_parallel=True)),
    "llama-no-gqa-tp2-sp-bf16": (
        "llama",
        EVEN | {"num_key_value_heads": 4},
        False,
        "bf16",
        LayoutConfig(tensor_parallel=2, sequence_parallel=True),
    ),
    "qwen3-cp2": ("qwen3", EVEN, True, "fp32", LayoutConfig(context_parallel=2)),
    "llama-no-gqa-cp2-bf16": (
        "llama",
        EVEN | {"num_key_value_heads": 4},
        False,
        "bf16",
        LayoutConfig(context_parallel=2),
    ),
    "qwen3-pp2-tied": ("qwen3", EVEN, True, "bf16", LayoutConfig(pipeline_parallel=2)),
    "qwen2-tp2": ("qwen2", EVEN | {"head_dim": 32}, False, "bf16", LayoutConfig(tensor_parallel=2)),
    "llama-no-gqa": ("llama", EVEN | {"num_key_value_heads": 4}, False, "fp32", LayoutConfig()),
    "llama-no-gqa-pp2": ("llama", EVEN | {"num_key_value_heads": 4}, False, "bf16", LayoutConfig(pipeline_parallel=2)),
    "qwen3-odd": ("qwen3", ODD, False, "bf16", LayoutConfig()),
    "qwen3-odd-tp2": ("qwen3", ODD, True, "fp32", LayoutConfig(tensor_parallel=2)),
}
CASES |= {
    "qwen3-pp2-vpp2-tied": ("qwen3", EVEN | DEEP, True, "bf16", LayoutConfig(pipeline_parallel=2, virtual_pipeline=2)),
    "qwen3-pp2-vpp2-uneven": (
        "qwen3",
        EVEN | DEEP,
        False,
        "fp32",
        LayoutConfig(pipeline_parallel=2, virtual_pipeline=2, first_stage_layers=2),
    ),
    "qwen3-pp2-uneven": ("qwen3", EVEN | DEEP, False, "bf16", LayoutConfig(pipeline_parallel=2, last_stage_layers=3)),
    "hybrid-dp2": ("qwen3_5_text", EVEN | GATED_DELTA_NETS, False, "bf16", LayoutConfig()),
    "hybrid-tp2": ("qwen3_5_text", EVEN | GATED_DELTA_NETS, True, "bf16", LayoutConfig(tensor_parallel=2)),
    "moe-dp2": ("qwen3_moe", EXPERTS, False, "bf16", LayoutConfig()),
    "moe-ep2": ("qwen3_moe", EXPERTS, False, "bf16", LayoutConfig(expert_parallel=2)),
    "moe-cp2": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}, False, "fp32", LayoutConfig(context_parallel=2)),
}
ON_FOUR = {
    "qwen3-tp2-pp2-vpp2-tied": (
        "qwen3",
        EVEN | DEEP,
        True,
        "fp32",
        LayoutConfig(tensor_parallel=2, pipeline_parallel=2, virtual_pipeline=2),
    ),
    "qwen3-pp4-uneven": (
        "qwen3",
        EVEN | DEEP,
        True,
        "bf16",
        LayoutConfig(pipeline_parallel=4, first_stage_layers=1, last_stage_layers=3),
    ),
    "moe-ep2-dp4": ("qwen3_moe", EXPERTS, False, "fp32", LayoutConfig(expert_parallel=2)),
    "hybrid-moe-ep2-pp2": (
        "qwen3_5_moe_text",
        EXPERTS | GATED_DELTA_NETS | {"shared_expert_intermediate_size": 64},
        False,
        "bf16",
        LayoutConfig(pipeline_parallel=2, expert_parallel=2),
    ),
    "moe-ep2-etp2": ("qwen3_moe", EXPERTS, False, "bf16", LayoutConfig(expert_parallel=2, expert_tensor_parallel=2)),
    "moe-ep2-tp2-sp": (
        "qwen3_moe",
        EXPERTS,
        False,
        "bf16",
        LayoutConfig(tensor_parallel=2, sequence_parallel=True, expert_parallel=2),
    ),
    "moe-ep2-etp1-tp2-sp": (
        "qwen3_moe",
        EXPERTS,
        False,
        "bf16",
        LayoutConfig(tensor_parallel=2, sequence_parallel=True, expert_parallel=2, expert_tensor_parallel=1),
    ),
    "moe-ep2-pp2-vpp2": (
        "qwen3_moe",
        EXPERTS | DEEP,
        True,
        "bf16",
        LayoutConfig(pipeline_parallel=2, virtual_pipeline=2, expert_parallel=2),
    ),
}
if not HAS_GATED_DELTA_NETS:
    CASES, ON_FOUR = ({name: of[name] for name in of if "hybrid" not in name} for of in (CASES, ON_FOUR))
# Of some cases, the activations also with each kind of recompute.
RECOMPUTED = (
    *("qwen3-dp2", "qwen3-cp2", "qwen3-tp2-bf16", "llama-no-gqa", "qwen3-odd"),
    *("qwen3-pp2-uneven", "moe-dp2", "moe-cp2"),
)
RECOMPUTE = {
    "full": {"recompute": "full"},
    "two layers": {"recompute": "full", "recompute_layers": 2},
    "selective": {"recompute": "selective"},
    "attention": {"recompute": "selective", "recompute_modules": ("core_attn",)},
}
LAYERS = 3


def config_of(family, sizes, tied):
    sizes = {"vocab_size": 300, "max_position_embeddings": 256, "num_hidden_layers": LAYERS, **sizes}
    return {"model_type": family, "tie_word_embeddings": tied, **sizes}


def measure(rank, world_size):
    from rlad_megatron import platform
    from rlad_megatron.config import TrainConfig
    from rlad_megatron.parallel.groups import build_groups, seed_everything

    platform.setup()
    cases = CASES if world_size == 2 else ON_FOUR
    found = {}
    for layout in {case[-1]: None for case in cases.values()}:  # groups stay, with some 60 threads
        groups = build_groups(layout)
        for name, case in cases.items():
            if case[-1] != layout:
                continue
            seed_everything(0, groups)
            found[name] = measure_case(*case, groups)
            for kind in RECOMPUTE if name in RECOMPUTED else ():
                chunks = build(*case, groups, TrainConfig(**RECOMPUTE[kind]))
                found[name][kind] = measure_activations(chunks[0], groups)
    return found


def build(family, sizes, tied, precision, layout, groups, train):
    from rlad_megatron.config import ModelConfig
    from rlad_megatron.models.build import build_model
    from rlad_megatron.models.registry import as_model_spec

    spec = as_model_spec(config_of(family, sizes, tied))
    return build_model(spec, ModelConfig("", layout, precision), groups, train=train)


def measure_case(family, sizes, tied, precision, layout, groups):
    from rlad_megatron.config import ModelConfig, OptimizerConfig, TrainConfig
    from rlad_megatron.trainer.setup import build_optimizer, wrap_for_training

    config = ModelConfig("", layout, precision)
    chunks = build(family, sizes, tied, precision, layout, groups, TrainConfig())
    activations = measure_activations(chunks[0], groups) if len(chunks) == 1 else None
    wrapped = wrap_for_training(chunks, groups, OptimizerConfig(), config)
    optimizer, _ = build_optimizer(wrapped, OptimizerConfig(), config, 1)
    buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    state = 0
    for megatron in optimizer.chained_optimizers:
        moments = [value for values in megatron.optimizer.state.values() for value in values.values() if value.dim()]
        masters = [part for group in megatron.shard_fp32_from_float16_groups for part in group]
        state += sum(tensor.numel() * tensor.element_size() for tensor in [*moments, *masters])
    return {
        "stage": groups.pp_rank,
        "parameters": sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        "weights": sum(buffer.param_data.nbytes for buffer in buffers),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": state,
        "activations": activations,
    }


def measure_activations(gpt, groups):
    """Bytes of all storages that a forward pass keeps for backward, each once, parameters left out."""
    from rlad_megatron.models.forward import packed_seq_params

    held = TOKENS // groups.cp_size
    tokens = torch.arange(held)[None] % 300
    packed = packed_seq_params(torch.tensor([0, 12, TOKENS], dtype=torch.int32), gpt.config.transformer_impl)
    if groups.pp_rank > 0:
        hidden = torch.ones(held, 1, gpt.config.hidden_size, dtype=gpt.config.params_dtype, requires_grad=True)
        gpt.set_input_tensor(hidden)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gpt(tokens, tokens, None, packed_seq_params=packed)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.fixture(scope="module")
def measured():
    found = {}
    for ranks in (2, 4):
        by_rank = run_ranks(measure, ranks)
        found |= {name: [measured[name] for measured in by_rank] for name in by_rank[0]}
    return found


@pytest.mark.parametrize("name", CASES | ON_FOUR)
def test_bytes_are_what_megatron_allocates(measured, name):
    from rlad_megatron.config import OptimizerConfig, TrainConfig
    from rlad_megatron.models.registry import as_model_spec
    from rlad_megatron.plan import activations, memory

    family, sizes, tied, precision, layout = (CASES | ON_FOUR)[name]
    multiples = sizes is not ODD and "hybrid" not in name  # each parameter is a multiple of 64 elements
    ranks = measured[name]
    model = memory.Model(as_model_spec(config_of(family, sizes, tied)), layout, precision)
    data_parallel = len(ranks) // layout.copy_ranks
    for found in ranks:
        stage = found["stage"]
        assert found["parameters"] == model.parameters(stage)
        assert found["weights"] == memory.weight_bytes(model, stage, data_parallel)
        assert found["gradients"] == memory.gradient_bytes(model, stage, data_parallel)
        planned = memory.optimizer_bytes(model, stage, data_parallel, OptimizerConfig())
        padding = 0 if multiples else 64 * 12 * sum(found.number for found in model.parameter_sizes(stage))
        assert planned - padding <= found["optimizer"] <= planned
        if found["activations"] is None or "hybrid" in name:  # gated delta nets pad each segment to chunks of 64
            continue
        # Ranks that share experts receive different numbers of tokens, and on average what is planned.
        alike = [other for other in ranks if other["stage"] == stage] if layout.expert_parallel > 1 else [found]
        for kind in ("activations", *(set(found) & set(RECOMPUTE))):
            asked = {"attention": "local", "train": TrainConfig(**RECOMPUTE.get(kind, {}))}
            planned = activations.activation_bytes(model, stage, TOKENS, **asked)
            if activations.recomputed_layers(model, stage, asked["train"]) == model.layer_types(stage):
                # While backward runs.
                planned -= activations.recomputed_bytes(model, TOKENS, model.spec.layer_types[0], **asked)
            kept = sum(other[kind] for other in alike) / len(alike)
            assert planned / model.in_flight(stage) == pytest.approx(kept, rel=0.05), kind
    if multiples:
        largest = max(found["optimizer"] for found in ranks)
        assert largest == max(
            memory.optimizer_bytes(model, stage, data_parallel, OptimizerConfig())
            for stage in range(layout.pipeline_parallel)
        )
