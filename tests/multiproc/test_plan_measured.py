"""The planner's bytes against real Megatron models: weights, gradients, optimizer exactly, activations within 5%."""

import pytest
import torch
from harness import run_ranks

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
# name -> (family, sizes, tied, precision, LayoutConfig's first fields: TP, PP, whether SP, CP), on two ranks
CASES = {
    "qwen3-dp2": ("qwen3", EVEN, True, "fp32", 1, 1),
    "qwen3-dp2-bf16": ("qwen3", EVEN, False, "bf16", 1, 1),
    "qwen3-tp2": ("qwen3", EVEN, False, "fp32", 2, 1),
    "qwen3-tp2-bf16": ("qwen3", EVEN, True, "bf16", 2, 1),
    "qwen3-tp2-sp": ("qwen3", EVEN, False, "fp32", 2, 1, True),
    "llama-no-gqa-tp2-sp-bf16": ("llama", EVEN | {"num_key_value_heads": 4}, False, "bf16", 2, 1, True),
    "qwen3-cp2": ("qwen3", EVEN, True, "fp32", 1, 1, False, 2),
    "llama-no-gqa-cp2-bf16": ("llama", EVEN | {"num_key_value_heads": 4}, False, "bf16", 1, 1, False, 2),
    "qwen3-pp2-tied": ("qwen3", EVEN, True, "bf16", 1, 2),
    "qwen2-tp2": ("qwen2", EVEN | {"head_dim": 32}, False, "bf16", 2, 1),
    "llama-no-gqa": ("llama", EVEN | {"num_key_value_heads": 4}, False, "fp32", 1, 1),
    "llama-no-gqa-pp2": ("llama", EVEN | {"num_key_value_heads": 4}, False, "bf16", 1, 2),
    "qwen3-odd": ("qwen3", ODD, False, "bf16", 1, 1),
    "qwen3-odd-tp2": ("qwen3", ODD, True, "fp32", 2, 1),
}
# Of some cases, the activations also with each kind of recompute.
RECOMPUTED = ("qwen3-dp2", "qwen3-cp2", "qwen3-tp2-bf16", "llama-no-gqa", "qwen3-odd")
LAYERS = 3


def config_of(family, sizes, tied):
    sizes = {**sizes, "vocab_size": 300, "max_position_embeddings": 256, "num_hidden_layers": LAYERS}
    return {"model_type": family, "tie_word_embeddings": tied, **sizes}


def measure(rank, world_size):
    from rlad_megatron import platform

    platform.setup()
    found = {name: measure_case(rank, *case) for name, case in CASES.items()}
    for name in RECOMPUTED:
        for recompute in ("selective", "full"):
            found[name][recompute] = measure_case(rank, *CASES[name], recompute=recompute)["activations"]
    return found


def measure_case(rank, family, sizes, tied, precision, *layout, recompute="none"):
    from rlad_megatron.config import LayoutConfig, ModelConfig, OptimizerConfig
    from rlad_megatron.models.build import build_model
    from rlad_megatron.models.registry import as_model_spec
    from rlad_megatron.parallel.groups import build_groups, seed_everything
    from rlad_megatron.trainer.setup import build_optimizer, wrap_for_training

    layout = LayoutConfig(*layout)
    groups = build_groups(layout)
    seed_everything(0, groups)
    spec = as_model_spec(config_of(family, sizes, tied))
    config = ModelConfig("", layout, precision)
    gpt = build_model(spec, config, groups, recompute=recompute)
    activations = measure_activations(gpt, groups)
    model = wrap_for_training(gpt, groups, OptimizerConfig(), config)
    optimizer, _ = build_optimizer(model, OptimizerConfig(), config, 1)
    state = 0
    for megatron in optimizer.chained_optimizers:
        moments = [value for values in megatron.optimizer.state.values() for value in values.values() if value.dim()]
        masters = [part for group in megatron.shard_fp32_from_float16_groups for part in group]
        state += sum(tensor.numel() * tensor.element_size() for tensor in [*moments, *masters])
    return {
        "stage": groups.pp_rank,
        "parameters": sum(parameter.numel() for parameter in gpt.parameters()),
        "weights": sum(buffer.param_data.nbytes for buffer in model.buffers),
        "gradients": sum(buffer.grad_data.nbytes for buffer in model.buffers),
        "optimizer": state,
        "activations": activations,
    }


def measure_activations(gpt, groups):
    """Bytes of all storages that a forward pass keeps for backward, each once, parameters left out."""
    from rlad_megatron.models.forward import packed_seq_params

    held = TOKENS // groups.cp_size
    tokens = torch.arange(held)[None] % 300
    packed = packed_seq_params(torch.tensor([0, 12, TOKENS], dtype=torch.int32), gpt.config.transformer_impl)
    if not groups.is_first_stage:
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
    return run_ranks(measure, 2)


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_what_megatron_allocates(measured, name):
    from rlad_megatron.config import LayoutConfig, OptimizerConfig
    from rlad_megatron.models.registry import as_model_spec
    from rlad_megatron.plan import memory

    family, sizes, tied, precision, tp, pp, *others = CASES[name]
    model = memory.Model(as_model_spec(config_of(family, sizes, tied)), LayoutConfig(tp, pp, *others), precision)
    data_parallel = 2 // (tp * pp)
    for found in (ranks[name] for ranks in measured):
        stage = found["stage"]
        assert found["parameters"] == model.parameters(stage)
        assert found["weights"] == memory.weight_bytes(model, stage, data_parallel)
        assert found["gradients"] == memory.gradient_bytes(model, stage, data_parallel)
        planned = memory.optimizer_bytes(model, stage, data_parallel, OptimizerConfig())
        padding = 0 if sizes is not ODD else 64 * 12 * sum(count for *_, count in model.parameter_sizes(stage))
        assert planned - padding <= found["optimizer"] <= planned
        in_flight = pp - stage
        activations = memory.activation_bytes(model, stage, TOKENS, attention="local") / in_flight
        assert activations == pytest.approx(found["activations"], rel=0.05)
        for recompute in set(found) & {"selective", "full"}:
            asked = {"attention": "local", "recompute": recompute}
            # Forward keeps all but what backward computes again for one layer.
            kept = memory.activation_bytes(model, stage, TOKENS, **asked) - memory.recomputed_bytes(
                model, TOKENS, **asked
            )
            assert kept == pytest.approx(found[recompute], rel=0.05), recompute
    if sizes is not ODD:
        largest = max(ranks[name]["optimizer"] for ranks in measured)
        assert largest == max(
            memory.optimizer_bytes(model, stage, data_parallel, OptimizerConfig()) for stage in range(pp)
        )
