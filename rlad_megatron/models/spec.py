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
    share: float = 1.0  # of a head's dimensions, the first ones, that are rotated: `partial_rotary_factor`


@dataclass(frozen=True)
class ModelSpec:
    """A decoder. `num_experts` is 0 for a dense one, and the `gdn_` sizes are 0 without gated delta nets."""

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
    shared_expert_ffn_size: int = 0  # of the expert that computes every token
    gdn_key_heads: int = 0
    gdn_value_heads: int = 0
    gdn_key_head_dim: int = 0
    gdn_value_head_dim: int = 0
    gdn_conv_width: int = 0
    layer_types: tuple[str, ...] = ()  # of each layer, as config.json has them
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
            "shared_expert_ffn": self.shared_expert_ffn_size,
            "gdn_key": self.gdn_key_heads * self.gdn_key_head_dim,
            "gdn_value": self.gdn_value_heads * self.gdn_value_head_dim,
            "gdn_value_heads": self.gdn_value_heads,
            "gdn_value_head_dim": self.gdn_value_head_dim,
            "gdn_conv_width": self.gdn_conv_width,
            "one": 1,
        }[name]

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a head that the rotary embedding rotates."""
        return int(self.head_dim * self.rope.share)


_KINDS = {
    name: kind for name, kind in get_type_hints(ModelSpec).items() if name not in ("layer_types", "unknown_fields")
}
FULL_ATTENTION, LINEAR_ATTENTION = "full_attention", "linear_attention"
# Fields whose name in config.json differs.
_NAMES = {
    "num_layers": "num_hidden_layers",
    "ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "tied": "tie_word_embeddings",
    "expert_ffn_size": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok",
    "shared_expert_ffn_size": "shared_expert_intermediate_size",
    "gdn_key_heads": "linear_num_key_heads",
    "gdn_value_heads": "linear_num_value_heads",
    "gdn_key_head_dim": "linear_key_head_dim",
    "gdn_value_head_dim": "linear_value_head_dim",
    "gdn_conv_width": "linear_conv_kernel_dim",
}
# Fields that only some families have.
EXPERTS = ("num_experts", "expert_ffn_size", "experts_per_token", "norm_topk_prob")
SHARED_EXPERT = ("shared_expert_ffn_size",)
GATED_DELTA_NETS = tuple(name for name in _NAMES if name.startswith("gdn_"))
_OF_SOME = (*EXPERTS, *SHARED_EXPERT, *GATED_DELTA_NETS)
# What transformers assumes where config.json is silent, whatever the family.
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "norm_topk_prob": False}
_ORIGINAL = "original_max_position_embeddings"
PARTIAL_ROPE = "partial_rotary_factor"
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
    config: Mapping[str, Any],
    where: str,
    *,
    has: Collection[str],
    only: Mapping[str, Any],
    no_effect: Collection[str],
) -> ModelSpec:
    """A spec from the fields of a config.json, completed by the family's defaults.

    Args:
        where: the file, for messages.
        has: the fields of the spec that only some families have, and this one does.
        only: the fields of the family that may have only one value.
        no_effect: the fields of the family that do not change the logits.

    Raises:
        ConfigError: a field has a value that is not covered.
        CheckpointError: a field is missing, of a wrong type or impossible.
    """
    kinds = {name: kind for name, kind in _KINDS.items() if name in has or name not in _OF_SOME}
    read = {*(_NAMES.get(name, name) for name in kinds), *_ROPE_NAMES}
    read |= {"num_local_experts"} if "num_experts" in has else set()
    if PARTIAL_ROPE in has:
        read.add(PARTIAL_ROPE)
        only = {name: value for name, value in only.items() if name != PARTIAL_ROPE}
    family = f"{where} of this {config['model_type']} model"
    unknown = check_fields(config, only, read | {*no_effect}, family)
    config = {**_DEFAULTS, **config}
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        key = _NAMES.get(name, name)
        value = config.get(key)
        if name == "rope":
            partial = PARTIAL_ROPE in has
            value, unknown_rope = _parse_rope(
                config, values["max_position_embeddings"], where, family, partial=partial, no_effect=no_effect
            )
        elif name == "num_kv_heads" and value is None:
            value = values["num_heads"]
        elif name == "head_dim" and value is None and not values["hidden_size"] % values["num_heads"]:
            value = values["hidden_size"] // values["num_heads"]
        elif name == "ffn_size" and value is None and "num_experts" in has:  # in some families all layers have experts
            value = config.get("moe_intermediate_size")
        elif name == "num_experts" and "num_local_experts" in config:  # the name in files that transformers 5 writes
            value = config["num_local_experts"]
        values[name] = _checked(key, value, kind, where)
    if values["head_dim"] % 2:
        raise CheckpointError(f"{where}: head_dim={values['head_dim']} is odd; copy the model again")
    types = _parse_layer_types(config, values["num_layers"], where)
    spec = ModelSpec(**values, layer_types=types, unknown_fields=unknown + unknown_rope)
    if not 0 < spec.rope.share <= 1 or spec.rotated_dim % 2 or not spec.rotated_dim:
        raise CheckpointError(
            f"{where}: {PARTIAL_ROPE}={spec.rope.share} does not rotate an even number of a head's {spec.head_dim} "
            "dimensions; copy the model again"
        )
    return spec


def _parse_layer_types(config: Mapping[str, Any], num_layers: int, where: str) -> tuple[str, ...]:
    """The type of each layer, by default full attention in every `full_attention_interval`-th."""
    found = config.get("layer_types")
    if found is None:
        interval = _checked("full_attention_interval", config.get("full_attention_interval", 1), int, where)
        types = [LINEAR_ATTENTION if (layer + 1) % interval else FULL_ATTENTION for layer in range(num_layers)]
        return tuple(types)
    if len(_checked("layer_types", found, list, where)) != num_layers:
        raise CheckpointError(
            f"{where}: layer_types has {len(found)} entries for {num_layers} layers; copy the model again"
        )
    return tuple(found)


def _checked(key: str, value: Any, kind: type, where: str) -> Any:
    """The value as it is: converted checkpoints record numbers as config.json has them."""
    if value is None:
        raise CheckpointError(f"{where}: {key} is missing; copy the model again")
    if type(value) not in ((int, float) if kind is float else (kind,)):
        raise CheckpointError(f"{where}: {key}={value!r} is not of type {kind.__name__}; copy the model again")
    if kind is int and value < 1:
        raise CheckpointError(f"{where}: {key}={value} is not positive; copy the model again")
    return value


def _parse_rope(
    config: Mapping[str, Any], positions: int, where: str, family: str, *, partial: bool, no_effect: Collection[str]
) -> tuple[Rope, tuple[str, ...]]:
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
    read = needed | others | ({PARTIAL_ROPE} if partial else set())
    only = {name: value for name, value in ROPE_ONLY.items() if name not in (read | {*no_effect})}
    unknown = check_fields(given, only, ROPE_NO_EFFECT | read | {*no_effect}, family, f"{key}.")
    theta = _checked(f"{key}.rope_theta", given.get("rope_theta", config.get("rope_theta", 10000.0)), float, where)
    given[_ORIGINAL] = config.get(_ORIGINAL) or given.get(_ORIGINAL) or positions
    scaling = {
        name: _checked(f"{key}.{name}", given.get(name), bool if name == "truncate" else float, where)
        for name in sorted(needed | others & given.keys())
    }
    share = given.get(PARTIAL_ROPE, config.get(PARTIAL_ROPE, 1.0)) if partial else 1.0
    if share != 1.0 and kind == "yarn":
        # Its factor on cosines and sines would also scale the dimensions that are not rotated (models/build.py).
        raise ConfigError(
            f"{key}.rope_type='yarn' with {PARTIAL_ROPE}={share} in {family} is not covered; use a model without it"
        )
    return Rope(kind, theta, tuple(scaling.items()), _checked(f"{key}.{PARTIAL_ROPE}", share, float, where)), unknown
