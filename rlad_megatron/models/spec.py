"""What the code knows about a model. Torch-free; `models/config_json.py` reads it, once, from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from rlad_megatron.errors import CheckpointError


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
    hidden_act: str
    rope: Rope
    num_experts: int = 0
    expert_ffn_size: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = False  # the weights of a token's experts sum to 1

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


_KINDS = get_type_hints(ModelSpec)
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
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "norm_topk_prob": False}
_ROPE_NEEDS = {"linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


def parse_config(config: Mapping[str, Any], where: str, *, experts: bool) -> ModelSpec:
    """A spec from the fields of a config.json, completed by the family's defaults.

    where: the file, for messages. experts: the family has experts.

    Raises:
        CheckpointError: a field is missing, of a wrong type or impossible.
    """
    config = {**_DEFAULTS, **config}
    values: dict[str, Any] = {}
    for name, kind in _KINDS.items():
        key = _NAMES.get(name, name)
        value = config.get(key)
        if name == "rope":
            value = _parse_rope(config, values["max_position_embeddings"], where)
        elif name == "num_kv_heads" and value is None:
            value = values["num_heads"]
        elif name == "head_dim" and value is None and not values["hidden_size"] % values["num_heads"]:
            value = values["hidden_size"] // values["num_heads"]
        elif name == "num_experts" and "num_local_experts" in config:  # the name in files that transformers 5 writes
            value = config["num_local_experts"]
        if experts or name not in _OF_EXPERTS:
            values[name] = _checked(key, value, kind, where)
    if values["head_dim"] % 2:
        raise CheckpointError(f"{where}: head_dim={values['head_dim']} is odd; copy the model again")
    return ModelSpec(**values)


def _checked(key: str, value: Any, kind: type, where: str) -> Any:
    """The value as it is: converted checkpoints record numbers as config.json has them."""
    if value is None:
        raise CheckpointError(f"{where}: {key} is missing; copy the model again")
    if type(value) not in ((int, float) if kind is float else (kind,)):
        raise CheckpointError(f"{where}: {key}={value!r} is not of type {kind.__name__}; copy the model again")
    if kind is int and value < 1:
        raise CheckpointError(f"{where}: {key}={value} is not positive; copy the model again")
    return value


def _parse_rope(config: Mapping[str, Any], positions: int, where: str) -> Rope:
    """Rotary embedding in the old spelling (`rope_scaling`, `rope_theta`) or the new one (`rope_parameters`).

    As transformers does it: `modeling_rope_utils.py:RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = _checked(key, config.get(key) or {}, dict, where)
    given = {name: value for name, value in parameters.items() if value is not None}
    kind = given.pop("rope_type", None) or given.get("type", "default")
    theta = given.pop("rope_theta", config.get("rope_theta", 10000.0))
    if kind in ("llama3", "yarn", "longrope"):
        original = "original_max_position_embeddings"
        given[original] = config.get(original) or given.get(original) or positions
    # Lists belong to rope types that are not covered (models/rope.py).
    scaling = {name: value for name, value in given.items() if name != "type" and not isinstance(value, list)}
    needed = _ROPE_NEEDS.get(kind, ())
    for name in (*needed, *scaling):
        value = scaling.get(name)
        _checked(f"{key}.{name}", value, bool if type(value) is bool and name not in needed else float, where)
    return Rope(
        _checked(f"{key}.rope_type", kind, str, where),
        _checked(f"{key}.rope_theta", theta, float, where),
        tuple(sorted(scaling.items())),
    )
