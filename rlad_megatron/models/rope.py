"""Frequencies of the rotary embedding, from a Hugging Face configuration."""

from __future__ import annotations

import torch

from rlad_megatron.errors import ConfigError
from rlad_megatron.models.rules import model_shape

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the sequence


def rope_frequencies(hf_config) -> tuple[torch.Tensor, float]:
    """(inverse frequencies float32 [head_dim / 2], factor on cos and sin), as transformers computes them."""
    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope_type={kind!r} in config.json is not covered; covered: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        head_dim = model_shape(hf_config).head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
