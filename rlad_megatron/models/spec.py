"""What the code knows about a model. Torch-free; `models/config_json.py` reads it, once, from config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.config_fields import ROPE_NO_EFFECT, ROPE_ONLY, check_fields


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `rope_parameters` of config.json, under transformers' names."""

    rope_type: str
    rope_theta: float
    scaling: tuple[tuple[str, float], ...]  # the other parameters: (name, value)


@dataclass(frozen=True)
class ModelSpec:
    """A decoder. `num_experts` is 0 for a dense one."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool  # the head is the embedding
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    num_experts: int = 0
    expert_ffn_size: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = False  # the weights of a token's experts sum to 1
    unknown_fields: tuple[str, ...] = ()  # of config.json, as "name=value"; they may change the arithmetic

    def size(self, name: str) -> int:
        """A size by its name in the rules (models/rules.py)."""
        return {
            "hidden": self.hidden_size,
            "ffn": self.ffn_size,
            "query": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "head_dim": self.head_dim,
            "vocab": self.vocab_size,
            "experts": self.num_experts,
            "expert_ffn": self.expert_ffn_size,
        }[name]


_KINDS = {name: kind for name, kind in get_type_hints(ModelSpec).items() if name != "unknown_fields"}
# Fields whose name in config.json differs.
_NAMES = {
    "num_layers": "num_hidden_layers",
    "ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "tied": "tie_word_embeddings",
    "expert_ffn_size": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok",
}
_OF_EXPERTS = ("num_experts", "expert_ffn_size", "experts_per_token", "norm_topk_prob")
# What transformers assumes where config.json is silent, whatever the family.
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "norm_topk_prob": False}
_ORIGINAL = "original_max_position_embeddings"
_ROPE_NAMES = ("rope_parameters", "rope_scaling", "rope_theta", _ORIGINAL)
# The rope types whose frequencies do not depend on the sequence: the parameters that each needs, and those it may have.
_ROPE_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}, set()),
    "yarn": (
        {"factor", _ORIGINAL},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def parse_config(
    config: Mapping[str, Any], where: str, *, experts: bool, only: Mapping[str, Any], no_effect: Collection[str]
) -> ModelSpec:
    """A spec from the fields of a config.json, completed by the family's defaults.

    Args:
        where: the file, for messages.
        experts: the family has experts.
        only: the fields of the family that may have only one value.
        no_effect: the fields of the family that do not change the logits.

    Raises:
        ConfigError: a field has a value that is not covered.
        CheckpointError: a field is missing, of a wrong type or impossible.
    """
    kinds = {name: kind for name, kind in _KINDS.items() if experts or name not in _OF_EXPERTS}
    read = {*(_NAMES.get(name, name) for name in kinds), *_ROPE_NAMES, *({"num_local_experts"} if experts else ())}
    family = f"{where} of this {config['model_type']} model"
    unknown = check_fields(config, only, read | {*no_effect}, family)
    config = {**_DEFAULTS, **config}
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        key = _NAMES.get(name, name)
        value = config.get(key)
        if name == "rope":
            value, unknown_rope = _parse_rope(config, values["max_position_embeddings"], where, family)
        elif name == "num_kv_heads" and value is None:
            value = values["num_heads"]
        elif name == "head_dim" and value is None and not values["hidden_size"] % values["num_heads"]:
            value = values["hidden_size"] // values["num_heads"]
        elif name == "num_experts" and "num_local_experts" in config:  # the name in files that transformers 5 writes
            value = config["num_local_experts"]
        values[name] = _checked(key, value, kind, where)
    if values["head_dim"] % 2:
        raise CheckpointError(f"{where}: head_dim={values['head_dim']} is odd; copy the model again")
    return ModelSpec(**values, unknown_fields=unknown + unknown_rope)


def _checked(key: str, value: Any, kind: type, where: str) -> Any:
    """The value as it is: converted checkpoints record numbers as config.json has them."""
    if value is None:
        raise CheckpointError(f"{where}: {key} is missing; copy the model again")
    if type(value) not in ((int, float) if kind is float else (kind,)):
        raise CheckpointError(f"{where}: {key}={value!r} is not of type {kind.__name__}; copy the model again")
    if kind is int and value < 1:
        raise CheckpointError(f"{where}: {key}={value} is not positive; copy the model again")
    return value


def _parse_rope(config: Mapping[str, Any], positions: int, where: str, family: str) -> tuple[Rope, tuple[str, ...]]:
    """Rotary embedding in the old spelling (`rope_scaling`, `rope_theta`) or the new one (`rope_parameters`).

    As transformers does it: `modeling_rope_utils.py:RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`.
    Returns the unknown parameters too.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = _checked(key, config.get(key) or {}, dict, where)
    given = {name: value for name, value in parameters.items() if value is not None}
    kind = _checked(f"{key}.rope_type", given.get("rope_type") or given.get("type", "default"), str, where)
    if kind not in _ROPE_TYPES:
        raise ConfigError(f"{key}.rope_type={kind!r} in {family} is not covered; covered: {', '.join(_ROPE_TYPES)}")
    needed, others = _ROPE_TYPES[kind]
    unknown = check_fields(given, ROPE_ONLY, ROPE_NO_EFFECT | needed | others, family, f"{key}.")
    theta = _checked(f"{key}.rope_theta", given.get("rope_theta", config.get("rope_theta", 10000.0)), float, where)
    given[_ORIGINAL] = config.get(_ORIGINAL) or given.get(_ORIGINAL) or positions
    scaling = {
        name: _checked(f"{key}.{name}", given.get(name), bool if name == "truncate" else float, where)
        for name in sorted(needed | others & given.keys())
    }
    return Rope(kind, theta, tuple(scaling.items())), unknown
