"""The model families. Each is one table: Megatron parameter -> the Hugging Face tensors it is made of.

To add a family: a table here, a line in `FAMILIES`, a case in `tests/multiproc/test_family_parity.py`
(docs/add-a-family.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlad_megatron.errors import ConfigError
from rlad_megatron.models.config_fields import NO_EFFECT, ONLY
from rlad_megatron.models.rules import Rule
from rlad_megatron.models.spec import ModelSpec, parse_config

Table = Mapping[str, Rule]


def _of_layers(rows: Table) -> Table:
    """A table of every layer, from names within a layer."""
    return {
        f"decoder.layers.{{layer}}.{name}": replace(rule, hf=tuple(f"model.layers.{{layer}}.{hf}" for hf in rule.hf))
        for name, rule in rows.items()
    }


def _norm(name: str, size: str = "hidden") -> Rule:
    return Rule("replicated", (name,), (size,))


def _qkv(kind: str, columns: str | None) -> Rule:
    return Rule("kv_heads", tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv"), ("query", "kv", "kv"), columns)


def _feed_forward(megatron: str, hf: str, size: str) -> Table:
    return {
        f"{megatron}.linear_fc1.weight": Rule(
            "ranks", (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"), (size, size), "hidden"
        ),
        f"{megatron}.linear_fc2.weight": Rule("row_parallel", (f"{hf}.down_proj.weight",), ("hidden",), size),
    }


# Outside the layers all families are the same.
EMBEDDING = Rule("vocabulary", ("model.embed_tokens.weight",), ("vocab",), "hidden")
FINAL_NORM = _norm("model.norm.weight")
HEAD = Rule("vocabulary", ("lm_head.weight",), ("vocab",), "hidden")

_ATTENTION_AND_NORMS: Table = {
    "input_layernorm.weight": _norm("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": _qkv("weight", "hidden"),
    "self_attention.linear_proj.weight": Rule("row_parallel", ("self_attn.o_proj.weight",), ("hidden",), "query"),
    "pre_mlp_layernorm.weight": _norm("post_attention_layernorm.weight"),
}
_LLAMA_LAYER: Table = {**_ATTENTION_AND_NORMS, **_feed_forward("mlp", "mlp", "ffn")}
_MOE: Table = {
    "mlp.router.weight": Rule("replicated", ("mlp.gate.weight",), ("experts",), "hidden"),
    **_feed_forward("mlp.experts.local_experts.{expert}", "mlp.experts.{expert}", "expert_ffn"),
}
_QKV_BIAS: Table = {"self_attention.linear_qkv.bias": _qkv("bias", None)}
_QK_NORM: Table = {
    "self_attention.q_layernorm.weight": _norm("self_attn.q_norm.weight", "head_dim"),
    "self_attention.k_layernorm.weight": _norm("self_attn.k_norm.weight", "head_dim"),
}


@dataclass(frozen=True)
class Family:
    """A family of decoders that share a table."""

    layer: Table  # rows of every layer; one with "{expert}" in its names stands for one parameter per expert
    # What transformers assumes where config.json is silent.
    defaults: Mapping[str, object]
    # As in models/config_fields.py: more fields that may have only one value, or that do not change the logits.
    only: Mapping[str, object]
    no_effect: frozenset[str] = frozenset()
    # Fields of Megatron's TransformerConfig in which the family differs from a plain Llama.
    config_fields: Mapping[str, object] = field(default_factory=dict)
    # How checkpoints rename a layer's parameters. Transformer Engine fuses a norm into the linear layer that follows
    # it; Megatron names such norms that way with any layers.
    checkpoint_names: tuple[tuple[str, str], ...] = (
        ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
        ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    )

    @property
    def has_experts(self) -> bool:
        return any("{expert}" in name for name in self.layer)


_NO_BIAS = {"attention_bias": False, "qkv_bias": False}

LLAMA = Family(
    layer=_of_layers(_LLAMA_LAYER),
    defaults={"max_position_embeddings": 2048},
    only={**_NO_BIAS, "sliding_window": None, "architectures": ["LlamaForCausalLM", "LLaMAForCausalLM"]},
)

QWEN2 = Family(
    layer=_of_layers({**_LLAMA_LAYER, **_QKV_BIAS}),
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    only={"qk_norm": False, "architectures": ["Qwen2ForCausalLM"]},
    no_effect=frozenset({"attention_bias", "qkv_bias", "sliding_window"}),  # there are always biases, never a window
    config_fields={"add_qkv_bias": True},
)

QWEN3 = Family(
    layer=_of_layers({**_LLAMA_LAYER, **_QK_NORM}),
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    only={**_NO_BIAS, "architectures": ["Qwen3ForCausalLM"]},
    no_effect=frozenset({"sliding_window"}),
    config_fields={"qk_layernorm": True},
)

MISTRAL = Family(
    layer=LLAMA.layer,
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    only={**_NO_BIAS, "sliding_window": None, "architectures": ["MistralForCausalLM"]},
)

QWEN3_MOE = Family(
    layer=_of_layers({**_ATTENTION_AND_NORMS, **_QK_NORM, **_MOE}),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    only={
        **_NO_BIAS,
        "use_qk_norm": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 0,
        "scoring_func": "softmax",
        "architectures": ["Qwen3MoeForCausalLM"],
    },
    no_effect=frozenset({"sliding_window", "output_router_logits", "router_aux_loss_coef"}),
    config_fields={"qk_layernorm": True},
    checkpoint_names=(("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),),
)

# By `model_type` of config.json.
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}


def as_model_spec(config: Any, where: str = "config.json") -> ModelSpec:
    """The spec of a model.

    Args:
        config: a spec, the fields of a config.json, or a transformers configuration.
        where: the file, for messages.

    Raises:
        ConfigError: unknown `model_type`, or a field with a value that is not covered.
        CheckpointError: a field is missing, of a wrong type or impossible.
    """
    if isinstance(config, ModelSpec):
        return config
    given = config if isinstance(config, Mapping) else config.to_dict() | {"model_type": config.model_type}
    model_type = given.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type={model_type!r} in {where} is unknown; known: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    return parse_config(
        {**family.defaults, **given},
        where,
        experts=family.has_experts,
        only={**ONLY, **family.only},
        no_effect=NO_EFFECT | family.no_effect,
    )


def family_for(config: Any) -> Family:
    """The family of a model. Takes what `as_model_spec` takes, and raises the same errors."""
    return FAMILIES[as_model_spec(config).model_type]


def megatron_fields(spec: ModelSpec) -> dict[str, object]:
    """Fields of Megatron's TransformerConfig in which the model differs from a plain Llama."""
    fields = dict(family_for(spec).config_fields)
    if spec.num_experts:
        fields |= {
            "num_moe_experts": spec.num_experts,
            "moe_ffn_hidden_size": spec.expert_ffn_size,
            "moe_router_topk": spec.experts_per_token,
            # Softmax over the chosen experts equals softmax over all, renormalised over the chosen.
            "moe_router_pre_softmax": not spec.norm_topk_prob,
            "moe_router_load_balancing_type": "none",
        }
    return fields


def table_name(family: Family, parameter: str) -> str:
    """A model parameter's name in the family's table, whichever layers the model is made of.

    Transformer Engine's linear layers hold the norm before them; tables and shard plans name it as a separate layer.
    """
    for plain, fused in family.checkpoint_names:
        parameter = parameter.replace(f".{fused}", f".{plain}")
    return parameter
