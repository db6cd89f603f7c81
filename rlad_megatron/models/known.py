"""Models that recipes name, so that `rlad plan` works without their files. Data only.

Fields of the published config.json that decide shapes; the family's defaults (models/registry.py) complete them.
"""

from __future__ import annotations

_QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
_QWEN3 |= {"max_position_embeddings": 40960}
_QWEN3_1P7B = {
    **_QWEN3,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
_QWEN3_8B = {
    **_QWEN3,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072}

# By folder name, which is the model's name on the Hugging Face hub. tests/unit/test_plan.py has the parameter counts
# published there.
KNOWN_MODELS: dict[str, dict[str, object]] = {
    "Qwen3-0.6B": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-1.7B": _QWEN3_1P7B,
    "Qwen3-1.7B-Base": {**_QWEN3_1P7B, "max_position_embeddings": 32768},
    "Qwen3-8B": _QWEN3_8B,
    "Qwen3-8B-Base": {**_QWEN3_8B, "max_position_embeddings": 32768},
    "Qwen3-32B": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
    "DeepSeek-R1-Distill-Qwen-7B": {
        **_QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "DeepSeek-R1-Distill-Qwen-32B": {
        **_QWEN2,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}

# Folders that a script of this repository makes, by the name of their parent folder.
MADE_HERE = {"kk_tiny_untrained": "tools/make_model.py (the commands are in recipes/assets/README.md)"}
