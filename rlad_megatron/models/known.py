"""The sizes of models without their files: what `rlad plan` needs, from config.json or from the table below.

Torch-free. The table holds, for each model that a recipe names, those fields of its published config.json that
decide shapes; `model_shape`, `family_for` and `build_shard_plan` take the result like a transformers configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.registry import family_for

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

# By the name of the folder, which is the model's on the Hugging Face hub. Their parameters, as published there, are
# in tests/unit/test_plan.py.
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

# Folders that a script of this repository makes, by the name of the folder above.
MADE_HERE = {"kk_tiny_untrained": "tools/make_model.py (the commands are in recipes/assets/README.md)"}

# What transformers assumes where config.json is silent, as far as it decides shapes.
_DEFAULTS = {"tie_word_embeddings": False, "max_position_embeddings": 32768}


class ShapeFacts(SimpleNamespace):
    """Fields of a config.json as attributes. Compared by identity, so that results can be cached by it."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def how_to_get(path: str | Path) -> str:
    """What to do about a model's folder that is not there, as the end of a message."""
    script = MADE_HERE.get(Path(path).parent.name)
    return f"make it with {script}" if script else "give a folder in Hugging Face format, with config.json"


def shape_facts(path: str, role: str) -> ShapeFacts:
    """The fields that decide shapes: of `path`/config.json, or of the known model that the folder is named after.

    role: "student" or "teacher", for the message.

    Raises:
        ConfigError: neither the file nor a known name; or a model that no family covers.
        CheckpointError: config.json is not JSON, or lacks a size.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        try:
            raw = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{file}: not valid JSON ({error}); copy the model again") from error
    elif Path(path).name in KNOWN_MODELS:
        raw = KNOWN_MODELS[Path(path).name]
    else:
        raise ConfigError(
            f"{role}.path={path}: no config.json there, and {Path(path).name!r} is not one of the models known by name "
            f"({', '.join(KNOWN_MODELS)}); {how_to_get(path)}"
        )
    if raw.get("model_type") == "qwen3":
        raw = {"head_dim": 128, **raw}
    facts = ShapeFacts(**{"model_type": None, **_DEFAULTS, **raw})
    family_for(facts)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(getattr(facts, name, None), int):
            raise CheckpointError(f"{file}: {name} is missing or not a number; copy the model again")
    return facts
