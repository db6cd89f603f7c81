"""Models that recipes name, so that `rlad plan` works without their files. Data only.

Fields of the published config.json that decide shapes; the family's defaults (models/registry.py) complete them.
"""

from __future__ import annotations

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "max_position_embeddings": 40960}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072}
_QWEN3_MOE = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}

_QWEN3_5 = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
}
_QWEN3_5_MOE = {**_QWEN3_5, "model_type": "qwen3_5_moe_text"}


def _sizes(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, object]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
    }


_QWEN3_1P7B = {**_QWEN3, **_sizes(28, 2048, 6144, 16), "tie_word_embeddings": True}
_QWEN3_8B = {**_QWEN3, **_sizes(36, 4096, 12288, 32)}

# By folder name, which is the model's name on the Hugging Face hub. tests/unit/test_plan.py has the parameter counts
# published there.
KNOWN_MODELS: dict[str, dict[str, object]] = {
    "Qwen3-0.6B": {**_QWEN3, **_sizes(28, 1024, 3072, 16), "tie_word_embeddings": True},
    "Qwen3-1.7B": _QWEN3_1P7B,
    "Qwen3-1.7B-Base": {**_QWEN3_1P7B, "max_position_embeddings": 32768},
    "Qwen3-8B": _QWEN3_8B,
    "Qwen3-8B-Base": {**_QWEN3_8B, "max_position_embeddings": 32768},
    "Qwen3-32B": {**_QWEN3, **_sizes(64, 5120, 25600, 64)},
    "Qwen3-30B-A3B": {**_QWEN3_MOE, **_sizes(48, 2048, 6144, 32), "moe_intermediate_size": 768},
    "Qwen3-235B-A22B": {**_QWEN3_MOE, **_sizes(94, 4096, 12288, 64), "moe_intermediate_size": 1536},
    "Qwen3.5-2B": {
        **_QWEN3_5,
        **_sizes(24, 2048, 6144, 8),
        "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3.5-4B": {**_QWEN3_5, **_sizes(32, 2560, 9216, 16), "tie_word_embeddings": True},
    "Qwen3.5-27B": {**_QWEN3_5, **_sizes(64, 5120, 17408, 24), "linear_num_value_heads": 48},
    "Qwen3.5-35B-A3B": {**_QWEN3_5_MOE, **_sizes(40, 2048, 512, 16)},
    "DeepSeek-R1-Distill-Qwen-7B": {**_QWEN2, **_sizes(28, 3584, 18944, 28), "num_key_value_heads": 4},
    "DeepSeek-R1-Distill-Qwen-32B": {**_QWEN2, **_sizes(64, 5120, 27648, 40), "num_key_value_heads": 8},
}

# Folders that a script of this repository makes, by the name of their parent folder.
MADE_HERE = {"kk_tiny_untrained": "tools/make_model.py (the commands are in recipes/assets/README.md)"}
