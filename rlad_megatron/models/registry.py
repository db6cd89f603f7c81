"""The model families. Each is one table: Megatron parameter -> the Hugging Face tensors it is made of.

To add a family: a table here, a line in `FAMILIES`, a case in `tests/multiproc/test_family_parity.py`
(docs/add-a-family.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.config_fields import NO_EFFECT, ONLY
from rlad_megatron.models.rules import Rule
from rlad_megatron.models.spec import (
    EXPERTS,
    FULL_ATTENTION,
    GATED_DELTA_NETS,
    LINEAR_ATTENTION,
    PARTIAL_ROPE,
    SHARED_EXPERT,
    ModelSpec,
    parse_config,
)

Table = Mapping[str, Rule]


def _of_layers(rows: Table) -> Table:
    """A table of every layer, from names within a layer."""
    return {
        f"decoder.layers.{{layer}}.{name}": replace(rule, hf=tuple(f"model.layers.{{layer}}.{hf}" for hf in rule.hf))
        for name, rule in rows.items()
    }


def _norm(name: str, size: str = "hidden") -> Rule:
    return Rule("replicated", (name,), (size,))


def _qkv(kind: str, columns: tuple[str, ...], query: str | tuple[str, ...] = "query") -> Rule:
    return Rule("kv_heads", tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv"), (query, "kv", "kv"), columns)


def _feed_forward(megatron: str, hf: str, size: str) -> Table:
    return {
        f"{megatron}.linear_fc1.weight": Rule(
            "ranks", (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"), (size, size), ("hidden",)
        ),
        f"{megatron}.linear_fc2.weight": Rule("row_parallel", (f"{hf}.down_proj.weight",), ("hidden",), (size,)),
    }


# Outside the layers all families are the same.
EMBEDDING = Rule("vocabulary", ("model.embed_tokens.weight",), ("vocab",), ("hidden",))
FINAL_NORM = _norm("model.norm.weight")
HEAD = Rule("vocabulary", ("lm_head.weight",), ("vocab",), ("hidden",))

_ATTENTION: Table = {
    "self_attention.linear_qkv.weight": _qkv("weight", ("hidden",)),
    "self_attention.linear_proj.weight": Rule("row_parallel", ("self_attn.o_proj.weight",), ("hidden",), ("query",)),
}
_FEED_FORWARD = _feed_forward("mlp", "mlp", "ffn")
_MOE: Table = {
    "mlp.router.weight": Rule("replicated", ("mlp.gate.weight",), ("experts",), ("hidden",)),
    **_feed_forward("mlp.experts.local_experts.{expert}", "mlp.experts.{expert}", "expert_ffn"),
}
_QKV_BIAS: Table = {"self_attention.linear_qkv.bias": _qkv("bias", ())}
_QK_NORM: Table = {
    "self_attention.q_layernorm.weight": _norm("self_attn.q_norm.weight", "head_dim"),
    "self_attention.k_layernorm.weight": _norm("self_attn.k_norm.weight", "head_dim"),
}
_QKV_GATE: Table = {"self_attention.linear_qkv.weight": _qkv("weight", ("hidden",), query=("query", "query"))}
_SHARED_EXPERT: Table = {
    **_feed_forward("mlp.shared_experts", "mlp.shared_expert", "shared_expert_ffn"),
    "mlp.shared_experts.gate_weight": Rule("replicated", ("mlp.shared_expert_gate.weight",), ("one",), ("hidden",)),
}
_GDN_QKV = ("gdn_key", "gdn_key", "gdn_value")
# Megatron's module: megatron/core/ssm/gated_delta_net.
_GATED_DELTA_NET: Table = {
    "self_attention.in_proj.weight": Rule(
        "ranks",
        tuple(f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")),
        (_GDN_QKV, "gdn_value", "gdn_value_heads", "gdn_value_heads"),
        ("hidden",),
        stored=("query", "key", "value", "z", "beta", "alpha"),
    ),
    "self_attention.conv1d.weight": Rule(
        "ranks",
        ("linear_attn.conv1d.weight",),
        (_GDN_QKV,),
        ("one", "gdn_conv_width"),
        stored=("query", "key", "value"),
    ),
    **{
        f"self_attention.{name}": Rule("ranks", (f"linear_attn.{name}",), ("gdn_value_heads",), float32=True)
        for name in ("A_log", "dt_bias")
    },
    "self_attention.out_norm.gain": replace(
        _norm("linear_attn.norm.weight", "gdn_value_head_dim"), float32=True, zero_centered="weight"
    ),
    "self_attention.out_proj.weight": Rule(
        "row_parallel", ("linear_attn.out_proj.weight",), ("hidden",), ("gdn_value",)
    ),
}


@dataclass(frozen=True)
class Layer:
    """The layers of one type."""

    table: Table  # a row with "{expert}" in its names stands for one parameter per expert
    # How checkpoints rename a layer's parameters. Transformer Engine fuses a norm into the linear layer that follows
    # it; Megatron names such norms that way with any layers.
    checkpoint_names: tuple[tuple[str, str], ...]


# The norms of a layer, and the linear layers that may follow them.
_FUSED_NORMS = (
    ("input_layernorm", "self_attention.linear_qkv"),
    ("input_layernorm", "self_attention.in_proj"),
    ("pre_mlp_layernorm", "mlp.linear_fc1"),
)


def _layer(attention: Table, feed_forward: Table) -> Layer:
    """A type of layer, from names within a layer."""
    rows = {
        "input_layernorm.weight": _norm("input_layernorm.weight"),
        **attention,
        "pre_mlp_layernorm.weight": _norm("post_attention_layernorm.weight"),
        **feed_forward,
    }
    names = ((f"{norm}.", f"{linear}.layer_norm_") for norm, linear in _FUSED_NORMS if f"{linear}.weight" in rows)
    return Layer(_of_layers(rows), tuple(names))


@dataclass(frozen=True)
class Family:
    """A family of decoders that share tables."""

    layers: Mapping[str, Layer]  # by layer type, as `ModelSpec.layer_types` has it
    # What transformers assumes where config.json is silent.
    defaults: Mapping[str, object]
    # As in models/config_fields.py: more fields that may have only one value, or that do not change the logits.
    only: Mapping[str, object]
    no_effect: frozenset[str] = frozenset()
    # Fields of Megatron's TransformerConfig in which the family differs from a plain Llama.
    config_fields: Mapping[str, object] = field(default_factory=dict)
    # Fields of the spec that only some families have (models/spec.py).
    has: tuple[str, ...] = ()


def _uniform(attention: Table, feed_forward: Table) -> Mapping[str, Layer]:
    return {FULL_ATTENTION: _layer(attention, feed_forward)}


_NO_BIAS = {"attention_bias": False, "qkv_bias": False}

LLAMA = Family(
    layers=_uniform(_ATTENTION, _FEED_FORWARD),
    defaults={"max_position_embeddings": 2048},
    only={**_NO_BIAS, "sliding_window": None, "architectures": ["LlamaForCausalLM", "LLaMAForCausalLM"]},
)

QWEN2 = Family(
    layers=_uniform({**_ATTENTION, **_QKV_BIAS}, _FEED_FORWARD),
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    only={"qk_norm": False, "architectures": ["Qwen2ForCausalLM"]},
    no_effect=frozenset({"attention_bias", "qkv_bias", "sliding_window"}),  # there are always biases, never a window
    config_fields={"add_qkv_bias": True},
)

QWEN3 = Family(
    layers=_uniform({**_ATTENTION, **_QK_NORM}, _FEED_FORWARD),
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    only={**_NO_BIAS, "architectures": ["Qwen3ForCausalLM"]},
    no_effect=frozenset({"sliding_window"}),
    config_fields={"qk_layernorm": True},
)

MISTRAL = Family(
    layers=LLAMA.layers,
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    only={**_NO_BIAS, "sliding_window": None, "architectures": ["MistralForCausalLM"]},
)

QWEN3_MOE = Family(
    layers=_uniform({**_ATTENTION, **_QK_NORM}, _MOE),
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
    has=EXPERTS,
)


def _hybrid(feed_forward: Table) -> Mapping[str, Layer]:
    """Gated delta nets in most layers, attention with an output gate in the others."""
    return {
        LINEAR_ATTENTION: _layer(_GATED_DELTA_NET, feed_forward),
        FULL_ATTENTION: _layer({**_ATTENTION, **_QKV_GATE, **_QK_NORM}, feed_forward),
    }


QWEN3_5 = Family(
    layers=_hybrid(_FEED_FORWARD),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        PARTIAL_ROPE: 0.25,
    },
    only={
        "attention_bias": False,
        "attn_output_gate": True,
        "layer_types": [LINEAR_ATTENTION, FULL_ATTENTION],
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "architectures": ["Qwen3_5ForCausalLM"],
    },
    # Of text, all positions of a rotation are the same. The layers for multi-token prediction are left out.
    no_effect=frozenset(
        {
            "full_attention_interval",
            "mrope_section",
            "mrope_interleaved",
            "mtp_num_hidden_layers",
            "mtp_use_dedicated_embeddings",
        }
    ),
    config_fields={"qk_layernorm": True, "layernorm_zero_centered_gamma": True, "attention_output_gate": True},
    has=(*GATED_DELTA_NETS, PARTIAL_ROPE),
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    layers=_hybrid({**_MOE, **_SHARED_EXPERT}),
    defaults={
        **QWEN3_5.defaults,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
    },
    only={**QWEN3_5.only, "norm_topk_prob": True, "architectures": ["Qwen3_5MoeForCausalLM"]},
    no_effect=QWEN3_5.no_effect | {"output_router_logits", "router_aux_loss_coef"},
    has=(*QWEN3_5.has, *EXPERTS, *SHARED_EXPERT),
)

# By `model_type` of config.json.
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5_MOE,
}
# Models with a vision tower, whose text model is one of the above.
WITH_VISION = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}


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
    given = text_config(given, where)
    model_type = given.get("model_type")
    if model_type not in FAMILIES:
        known = sorted({*FAMILIES, *WITH_VISION})
        raise ConfigError(f"model_type={model_type!r} in {where} is unknown; known: {', '.join(known)}")
    family = FAMILIES[model_type]
    return parse_config(
        {**family.defaults, **given},
        where,
        has=family.has,
        only={**ONLY, **family.only},
        no_effect=NO_EFFECT | family.no_effect,
    )


def text_config(config: Mapping[str, Any], where: str = "config.json") -> Mapping[str, Any]:
    """The fields of the text model, if the model has a vision tower too; otherwise all as they are.

    Raises:
        CheckpointError: there are none.
    """
    model_type = config.get("model_type")
    if model_type not in WITH_VISION:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"{where}: text_config is missing; copy the model again")
    outer = {name: config[name] for name in ("tie_word_embeddings", "quantization_config") if name in config}
    return {**text, **outer, "model_type": WITH_VISION[model_type]}


def text_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json for the text model alone. Raises as `text_config`."""
    text = text_config(config)
    return text if text is config else {**text, "architectures": FAMILIES[text["model_type"]].only["architectures"]}


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
    if spec.shared_expert_ffn_size:
        fields |= {"moe_shared_expert_intermediate_size": spec.shared_expert_ffn_size, "moe_shared_expert_gate": True}
    if spec.gdn_value_heads:
        fields |= {
            "experimental_attention_variant": "gated_delta_net",
            "linear_attention_freq": [int(kind == LINEAR_ATTENTION) for kind in spec.layer_types],
            "linear_num_key_heads": spec.gdn_key_heads,
            "linear_num_value_heads": spec.gdn_value_heads,
            "linear_key_head_dim": spec.gdn_key_head_dim,
            "linear_value_head_dim": spec.gdn_value_head_dim,
            "linear_conv_kernel_dim": spec.gdn_conv_width,
        }
    return fields


def table_name(family: Family, parameter: str) -> str:
    """A model parameter's name in the family's table, whichever layers the model is made of.

    Transformer Engine's linear layers hold the norm before them; tables and shard plans name it as a separate layer.
    """
    for layer in family.layers.values():
        for plain, fused in layer.checkpoint_names:
            parameter = parameter.replace(f".{fused}", f".{plain}")
    return parameter
