"""The fields of config.json that every family shares, and the check that no field is overlooked. Torch-free.

A field is read into the `ModelSpec` (models/spec.py), listed here or in its family (models/registry.py), or unknown.
The lists come from `configuration_utils.py` and the families' `configuration_*.py` and `modeling_*.py` of transformers
5.19, and from what the families' models in vLLM 0.32 read.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from rlad_megatron.errors import ConfigError

# Fields that change the arithmetic: the only value that each may have. In place of a list: the items that it may have.
# null means the same as this value.
ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "bias": False,
    "mlp_bias": False,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_sliding_window": False,
    "layer_types": ["full_attention"],
    "attention_chunk_size": None,
    "dual_chunk_attention_config": None,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "logit_scale": 1.0,
    "pruned_heads": {},
    "per_layer_config": None,
    "quantization_config": None,
    "compression_config": None,
    "transformers_weights": None,
    "auto_map": None,
}
ROPE_ONLY: dict[str, Any] = {
    "partial_rotary_factor": 1.0,
    "rope_dim": None,
    "mrope_section": None,
    "mrope_interleaved": False,
    "use_fope": False,
    "full_attention": None,
    "sliding_attention": None,
}

_DEQUANTIZE = "convert the model to bf16 first"
_REMEDIES = {
    "quantization_config": _DEQUANTIZE,
    "compression_config": _DEQUANTIZE,
    "auto_map": "code of the model never runs here; if it computes what transformers' class does, remove the field",
    "transformers_weights": "name the weights as usual (model.safetensors) and remove the field",
}

# Fields that do not change the logits here. Dropout among them: training has none, so that its log-probs are those of
# the servers. The run's configuration chooses dtypes and sampling.
_OTHERS = """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation _flash_attn_2_enabled
    _name_or_path attention_dropout attn_implementation bos_token_id chunk_size_feed_forward
    classifier_dropout cls_token_id cross_attention_hidden_size custom_pipelines decoder_start_token_id dtype
    embd_pdrop eos_token_id experts_implementation finetuning_task gradient_checkpointing hidden_dropout id2label
    initializer_range is_decoder is_llama_config keys_to_ignore_at_inference label2id mask_token_id max_sequence_length
    max_window_layers model_max_length name_or_path num_labels output_attentions output_hidden_states pad_token_id
    prefix pretraining_tp problem_type resid_pdrop return_dict sep_token_id seq_length task_specific_params
    tf_legacy_loss tie_encoder_decoder tie_last_hidden_states tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict
"""
# GenerationConfig has them today.
_SAMPLING = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p
"""
NO_EFFECT = frozenset((_OTHERS + _SAMPLING).split())
ROPE_NO_EFFECT = frozenset({"type", "rope_type", "rope_theta", "original_max_position_embeddings", "finetuned"})


def check_fields(
    fields: Mapping[str, Any], only: Mapping[str, Any], known: Collection[str], where: str, prefix: str = ""
) -> tuple[str, ...]:
    """The fields that are in neither list, each as "name=value".

    where: the file and the family, for messages. prefix: of the names, for messages.

    Raises:
        ConfigError: a field of `only` has another value.
    """
    for name, allowed in only.items():
        value = fields.get(name)
        if value in (None, allowed):
            continue
        if isinstance(allowed, list) and isinstance(value, list) and all(item in allowed for item in value):
            continue
        remedy = _REMEDIES.get(name, f"use a model with {_shown(name, allowed)}")
        raise ConfigError(f"{_shown(prefix + name, value)} in {where} is not covered; {remedy}")
    return tuple(_shown(prefix + name, fields[name]) for name in sorted(fields.keys() - only.keys() - {*known}))


def _shown(name: str, value: Any) -> str:
    return f"{name}={textwrap.shorten(json.dumps(value, default=str), 80, placeholder='...')}"
