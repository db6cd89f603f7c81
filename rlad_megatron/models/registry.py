"""The model families, each one table: Megatron parameter -> the Hugging Face tensors it is made of.

To add a family: a table here, a line in `FAMILIES`, a case in `tests/multiproc/test_family_parity.py`
(docs/add-a-family.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlad_megatron.errors import ConfigError
from rlad_megatron.models.rules import ColumnParallel, Replicated, RowParallel, Rule, VocabParallel

Table = tuple[tuple[str, Rule], ...]


@dataclass(frozen=True)
class Family:
    """A family of decoders that share a table."""

    embedding: Table
    layer: Table  # names hold "{layer}"; rows that hold "{expert}" are there once for each expert
    final_norm: Table
    head: Table  # not there when embeddings are tied
    # Fields of Megatron's TransformerConfig in which the family differs from a plain Llama.
    config_fields: Callable[[Any], dict[str, object]]
    # (condition on the transformers configuration, what it is called): options that the table does not cover.
    refused: tuple[tuple[Callable[[Any], bool], str], ...] = ()
    # How parameters of a layer are renamed in checkpoints. Transformer Engine fuses a norm into the linear layer that
    # follows; Megatron gives such norms that name whatever the layers are made of.
    checkpoint_names: tuple[tuple[str, str], ...] = (
        ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
        ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    )


_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."
_M_LAYER = "decoder.layers.{layer}."

_EMBEDDING: Table = (("embedding.word_embeddings.weight", VocabParallel("model.embed_tokens.weight")),)
_FINAL_NORM: Table = (("decoder.final_layernorm.weight", Replicated("model.norm.weight", ("hidden",))),)
_HEAD: Table = (("output_layer.weight", VocabParallel("lm_head.weight")),)

_ATTENTION_AND_NORMS: Table = (
    (
        _M_LAYER + "input_layernorm.weight",
        Replicated("model.layers.{layer}.input_layernorm.weight", ("hidden",)),
    ),
    (
        _M_LAYER + "self_attention.linear_qkv.weight",
        ColumnParallel(
            (_ATTENTION + "q_proj.weight", _ATTENTION + "k_proj.weight", _ATTENTION + "v_proj.weight"),
            ("query", "kv", "kv"),
            units="kv_heads",
        ),
    ),
    (
        _M_LAYER + "self_attention.linear_proj.weight",
        RowParallel(_ATTENTION + "o_proj.weight", "hidden", "query"),
    ),
    (
        _M_LAYER + "pre_mlp_layernorm.weight",
        Replicated("model.layers.{layer}.post_attention_layernorm.weight", ("hidden",)),
    ),
)

_GATED_MLP: Table = (
    (
        _M_LAYER + "mlp.linear_fc1.weight",
        ColumnParallel((_MLP + "gate_proj.weight", _MLP + "up_proj.weight"), ("ffn", "ffn"), units="ranks"),
    ),
    (_M_LAYER + "mlp.linear_fc2.weight", RowParallel(_MLP + "down_proj.weight", "hidden", "ffn")),
)

_LLAMA_LAYER: Table = _ATTENTION_AND_NORMS + _GATED_MLP

_MOE: Table = (
    (_M_LAYER + "mlp.router.weight", Replicated(_MLP + "gate.weight", ("experts", "hidden"))),
    (
        _M_LAYER + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        ColumnParallel(
            (_MLP + "experts.{expert}.gate_proj.weight", _MLP + "experts.{expert}.up_proj.weight"),
            ("expert_ffn", "expert_ffn"),
            units="ranks",
        ),
    ),
    (
        _M_LAYER + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        RowParallel(_MLP + "experts.{expert}.down_proj.weight", "hidden", "expert_ffn"),
    ),
)

_QKV_BIAS: Table = (
    (
        _M_LAYER + "self_attention.linear_qkv.bias",
        ColumnParallel(
            (_ATTENTION + "q_proj.bias", _ATTENTION + "k_proj.bias", _ATTENTION + "v_proj.bias"),
            ("query", "kv", "kv"),
            units="kv_heads",
            columns=None,
        ),
    ),
)

_QK_NORM: Table = (
    (_M_LAYER + "self_attention.q_layernorm.weight", Replicated(_ATTENTION + "q_norm.weight", ("head_dim",))),
    (_M_LAYER + "self_attention.k_layernorm.weight", Replicated(_ATTENTION + "k_norm.weight", ("head_dim",))),
)


def _attention_bias(hf_config) -> bool:
    return bool(getattr(hf_config, "attention_bias", False))


def _sliding_window(hf_config) -> bool:
    return bool(getattr(hf_config, "use_sliding_window", False))


LLAMA = Family(
    embedding=_EMBEDDING,
    layer=_LLAMA_LAYER,
    final_norm=_FINAL_NORM,
    head=_HEAD,
    config_fields=lambda hf: {},
    refused=(
        (_attention_bias, "attention_bias=true"),
        (lambda hf: bool(getattr(hf, "mlp_bias", False)), "mlp_bias=true"),
    ),
)

QWEN2 = Family(
    embedding=_EMBEDDING,
    layer=_LLAMA_LAYER + _QKV_BIAS,
    final_norm=_FINAL_NORM,
    head=_HEAD,
    config_fields=lambda hf: {"add_qkv_bias": True},
    refused=((_sliding_window, "use_sliding_window=true"),),
)

QWEN3 = Family(
    embedding=_EMBEDDING,
    layer=_LLAMA_LAYER + _QK_NORM,
    final_norm=_FINAL_NORM,
    head=_HEAD,
    config_fields=lambda hf: {"qk_layernorm": True},
    refused=((_attention_bias, "attention_bias=true"), (_sliding_window, "use_sliding_window=true")),
)

MISTRAL = Family(
    embedding=_EMBEDDING,
    layer=_LLAMA_LAYER,
    final_norm=_FINAL_NORM,
    head=_HEAD,
    config_fields=lambda hf: {},
    refused=((lambda hf: getattr(hf, "sliding_window", None) is not None, "sliding_window"),),
)

QWEN3_MOE = Family(
    embedding=_EMBEDDING,
    layer=_ATTENTION_AND_NORMS + _QK_NORM + _MOE,
    final_norm=_FINAL_NORM,
    head=_HEAD,
    config_fields=lambda hf: {
        "qk_layernorm": True,
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_router_topk": hf.num_experts_per_tok,
        # Softmax over the chosen experts alone is softmax over all, renormalised over the chosen.
        "moe_router_pre_softmax": not hf.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    },
    refused=(
        (_attention_bias, "attention_bias=true"),
        (_sliding_window, "use_sliding_window=true"),
        (lambda hf: bool(getattr(hf, "mlp_only_layers", None)), "mlp_only_layers"),
        (lambda hf: getattr(hf, "decoder_sparse_step", 1) != 1, "decoder_sparse_step other than 1"),
    ),
    checkpoint_names=(("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),),
)


def table_name(family: Family, parameter: str) -> str:
    """The name in the family's table of a model's parameter, whichever layers the model is made of.

    Transformer Engine's linear layers hold the norm before them; tables and shard plans name it as a layer of its own.
    """
    for plain, fused in family.checkpoint_names:
        parameter = parameter.replace(f".{fused}", f".{plain}")
    return parameter


# By `model_type` of config.json.
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}


def family_for(hf_config) -> Family:
    """The family of a transformers configuration.

    Raises:
        ConfigError: unknown `model_type`, or an option of the model that its family's table does not cover.
    """
    model_type = hf_config.model_type
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type={model_type!r} in config.json is unknown; known: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    for condition, name in family.refused:
        if condition(hf_config):
            raise ConfigError(
                f"{name} in config.json of this {model_type} model is not covered; use a model without it"
            )
    return family
