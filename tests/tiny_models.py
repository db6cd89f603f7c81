"""Small random checkpoints of every family, with awkward sizes."""

import torch
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
from transformers.utils.logging import disable_progress_bar

from rlad_megatron.platform.megatron_versions import missing_for_gated_delta_nets

disable_progress_bar()  # they are printed to stderr, where tests look for one line

HAS_GATED_DELTA_NETS = not missing_for_gated_delta_nets(gpu=False)  # make test-compat has an older Megatron-Core
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "intermediate_size": 88,
    "vocab_size": 1003,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # sharp distributions, so that an error shows
}
CLASSES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "qwen3_5_text": Qwen3_5TextConfig,
    "qwen3_5_moe_text": Qwen3_5MoeTextConfig,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
GATED_DELTA_NETS = {
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}
OWN = {
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 10},
    "qwen3_moe": EXPERTS,
    "qwen3_5_text": GATED_DELTA_NETS,
    "qwen3_5_moe_text": GATED_DELTA_NETS | EXPERTS | {"shared_expert_intermediate_size": 28},
}


def make_model(folder, family, *, dtype=torch.float32, **changes):
    """Write a model of the family with every tensor random, also norms and biases; returns the folder as text."""
    config = CLASSES[family](**(SIZES | OWN.get(family, {}) | changes))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("A_log"):
                parameter.sub_(3.0)  # a slower decay, so that what a state remembers shows
    model.to(dtype).save_pretrained(folder)
    return str(folder)
