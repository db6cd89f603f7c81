"""Every family agrees with transformers in float32, whatever the layout, from the same safetensors."""

import pytest
import torch
from harness import run_ranks
from rich.console import Console
from tiny_models import HAS_GATED_DELTA_NETS
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rlad_megatron.config import LayoutConfig
from rlad_megatron.convert.layout import CheckpointLayout
from rlad_megatron.convert.run import convert
from rlad_megatron.convert.targets import Conversion

pytestmark = pytest.mark.multiproc

AWKWARD = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 176,
    "vocab_size": 1003,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # sharp distributions, so that an error shows
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}

CASES = {
    "llama-untied": LlamaConfig(**AWKWARD, tie_word_embeddings=False),
    "llama-tied-llama3-rope": LlamaConfig(
        **AWKWARD, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE, head_dim=40
    ),
    "qwen2-bias-yarn": Qwen2Config(**AWKWARD, tie_word_embeddings=False, rope_parameters=YARN_ROPE),
    "qwen3-tied-head-dim": Qwen3Config(**AWKWARD, tie_word_embeddings=True, head_dim=40),
    "qwen3-untied": Qwen3Config(**AWKWARD, tie_word_embeddings=False, head_dim=16),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 56}
CASES |= {
    "mistral": MistralConfig(**AWKWARD, tie_word_embeddings=False, sliding_window=None, head_dim=40),
    "qwen3-moe-renormalised": Qwen3MoeConfig(**AWKWARD, **EXPERTS, norm_topk_prob=True, head_dim=40),
    "qwen3-moe": Qwen3MoeConfig(**AWKWARD, **EXPERTS, norm_topk_prob=False, tie_word_embeddings=True),
}
GATED_DELTA_NETS = {
    "initializer_range": 0.1,  # at 0.2 their rounding errors grow so much that transformers itself is off by 2e-4
    "head_dim": 40,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e5,
        "partial_rotary_factor": 0.4,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
CASES |= {
    "qwen3.5": Qwen3_5TextConfig(**AWKWARD | GATED_DELTA_NETS, tie_word_embeddings=True),
    "qwen3.5-moe": Qwen3_5MoeTextConfig(**AWKWARD | GATED_DELTA_NETS | EXPERTS, shared_expert_intermediate_size=44),
}
# Loaded from a Megatron checkpoint, which was written for another layout than any of the test's.
CONVERTED = {
    "llama-tied-llama3-rope": (4, 3, 1),
    "qwen3-moe": (1, 2, 2),
    "qwen3.5": (2, 3, 1),
    "qwen3.5-moe": (2, 2, 2),
}
if not HAS_GATED_DELTA_NETS:
    CASES, CONVERTED = ({name: of[name] for name in of if "3.5" not in name} for of in (CASES, CONVERTED))
LENGTHS = [(5, 20), (1, 3), (30, 45), (7, 1), (1, 1)]  # (prompt, response) of the samples that are packed together


def make_samples():
    from rlad_megatron.types import Sample

    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            tokens=torch.randint(0, 1003, (prompt + response,), generator=generator),
            prompt_length=prompt,
            weight=torch.ones(response),
        )
        for prompt, response in LENGTHS
    ]


def megatron_log_probs(rank, world_size, folders, layout, budgets):
    """Of each case, the log-probs of all samples for each budget of tokens."""
    from rlad_megatron import platform
    from rlad_megatron.config import LossConfig, ModelConfig
    from rlad_megatron.models.build import build_model, named_parameters
    from rlad_megatron.models.config_json import read_model_spec
    from rlad_megatron.models.forward import score_samples
    from rlad_megatron.models.load import load_weights, open_checkpoint
    from rlad_megatron.models.shard_plan import build_shard_plan
    from rlad_megatron.parallel.groups import build_groups, seed_everything

    platform.setup()
    groups = build_groups(layout)
    seed_everything(0, groups)
    results = {}
    for case, folder in folders.items():
        spec = read_model_spec(folder)
        chunks = build_model(spec, ModelConfig(path=folder, layout=layout, precision="fp32"), groups, frozen=True)
        entries = build_shard_plan(spec, layout).entries(groups.place)
        load_weights(named_parameters(chunks, spec), entries, open_checkpoint(folder, spec))
        results[case] = [
            score_samples(
                chunks,
                groups,
                make_samples(),
                vocab_size=spec.vocab_size,
                temperature=1.0,
                budget_tokens=budget,
                token_multiple=16 * layout.tensor_parallel * layout.context_parallel,
                loss=LossConfig(),
            )
            for budget in budgets
        ]
    return results


def transformers_log_probs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    results = []
    for sample in make_samples():
        with torch.no_grad():
            log_probs = model(sample.tokens[None]).logits[0].log_softmax(-1)
        at = torch.arange(sample.prompt_length - 1, sample.tokens.numel() - 1)
        results.append(log_probs[at, sample.tokens[sample.prompt_length :]])
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, config in CASES.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # norms and biases: away from their trivial initial values
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                assert parameter_name
        made[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(made[name])
    for name, (tp, pp, ep) in CONVERTED.items():
        hf, made[name + "-converted"] = made[name], str(tmp_path_factory.mktemp(name + "-converted"))
        layout = CheckpointLayout(tp, pp, expert_parallel=ep)
        convert(Conversion(hf, made[name + "-converted"], hf, layout), Console(quiet=True), verify=False)
    return made


@pytest.fixture(scope="module")
def expected(folders):
    """By case, the log-probs of all samples."""
    found = {case: transformers_log_probs(folders[case]) for case in CASES}
    return found | {f"{case}-converted": found[case] for case in CONVERTED}


LAYOUTS = {
    "tp1": (1, LayoutConfig()),
    "tp2": (2, LayoutConfig(2)),
    "pp2": (2, LayoutConfig(1, 2)),
    "pp2-vpp2": (2, LayoutConfig(1, 2, virtual_pipeline=2)),
    "pp2-uneven": (2, LayoutConfig(1, 2, first_stage_layers=1)),
    "cp2": (2, LayoutConfig(context_parallel=2)),
    "ep2": (2, LayoutConfig(expert_parallel=2)),
    "tp2-ep2-etp1": (2, LayoutConfig(2, expert_parallel=2, expert_tensor_parallel=1)),  # only a teacher's
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_log_probs_agree_with_transformers(folders, expected, name):
    world_size, layout = LAYOUTS[name]
    if layout.expert_parallel > 1:
        folders = {case: folder for case, folder in folders.items() if "moe" in case}
    # A budget of 80 tokens makes two micro-batches, of several samples each; one of 1 token makes one for each sample.
    for results in run_ranks(megatron_log_probs, world_size, folders, layout, (80, 1)):
        for case, (packed, alone) in results.items():
            for ours, single, theirs in zip(packed, alone, expected[case], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, msg=lambda m, case=case: f"{case}: {m}")
                torch.testing.assert_close(ours, single, atol=1e-5, rtol=0, msg=lambda m, case=case: f"{case}: {m}")
