"""The model families, each one table: Megatron parameter -> the Hugging Face tensors it is made of.

To add a family: a table here, a line in `FAMILIES`, a case in `tests/multiproc/test_family_parity.py`
(docs/add-a-family.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlad_megatron.errors import ConfigError
from rlad_megatron.models.rules import ColumnParallel, Replicated, RowParallel, Rule, VocabParallel

Table = tuple[tuple[str, Rule], ...]


@dataclass(frozen=True)
class Family:
    """A family of decoders that share a table."""

    embedding: Table
    layer: Table  # names hold "{layer}"
    final_norm: Table
    head: Table  # not there when embeddings are tied
    # Fields of Megatron's TransformerConfig in which the family differs from a plain Llama.
    config_fields: Callable[[object], dict[str, object]]
    # (condition on the transformers configuration, what it is called): options that the table does not cover.
    refused: tuple[tuple[Callable[[object], bool], str], ...] = ()


_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."
_M_LAYER = "decoder.layers.{layer}."

_EMBEDDING: Table = (("embedding.word_embeddings.weight", VocabParallel("model.embed_tokens.weight")),)
_FINAL_NORM: Table = (("decoder.final_layernorm.weight", Replicated("model.norm.weight", ("hidden",))),)
_HEAD: Table = (("output_layer.weight", VocabParallel("lm_head.weight")),)

_LLAMA_LAYER: Table = (
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
    (
        _M_LAYER + "mlp.linear_fc1.weight",
        ColumnParallel((_MLP + "gate_proj.weight", _MLP + "up_proj.weight"), ("ffn", "ffn"), units="ranks"),
    ),
    (_M_LAYER + "mlp.linear_fc2.weight", RowParallel(_MLP + "down_proj.weight", "hidden", "ffn")),
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

FAMILIES: dict[str, Family] = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}  # by `model_type` of config.json


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
