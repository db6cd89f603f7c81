"""A spec read from config.json has the values that transformers reads from it."""

import json

import pytest
import torch
from tiny_models import EXPERTS, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.models.registry import FAMILIES, as_model_spec, family_for
from rlad_megatron.models.rope import rope_frequencies
from rlad_megatron.models.spec import Rope

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Every field that is read, none at its default.
FULL = {**SIZES, **EXPERTS, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "hidden_act": "gelu"}
ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16, "truncate": False},
    "yarn without length": {"factor": 4.0, "attention_factor": 1.25},
}


def config_of(family, **fields):
    return {"model_type": family, "sliding_window": None, **fields}


def read_both(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_spec(folder), AutoConfig.from_pretrained(folder)


def assert_same(spec, config):
    heads = config.num_attention_heads
    expected = {
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_size": config.intermediate_size,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads,
        # As the models of transformers read it.
        "head_dim": getattr(config, "head_dim", config.hidden_size // heads),
        "vocab_size": config.vocab_size,
        "tied": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.hidden_act,
    }
    if config.model_type == "qwen3_moe":
        expected |= {
            "num_experts": config.num_experts,
            "expert_ffn_size": config.moe_intermediate_size,
            "experts_per_token": config.num_experts_per_tok,
            "norm_topk_prob": config.norm_topk_prob,
        }
    assert {name: getattr(spec, name) for name in expected} == expected
    assert type(spec.rms_norm_eps) is type(config.rms_norm_eps)
    assert (spec.num_experts > 0) == (config.model_type == "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_and_every_default_is_that_of_transformers(tmp_path, family):
    full = config_of(family, **FULL)
    assert_same(*read_both(tmp_path, full))
    for name in full.keys() - {*REQUIRED, "model_type", "sliding_window"}:
        assert_same(*read_both(tmp_path, {key: value for key, value in full.items() if key != name}))
    minimal = config_of(family, **{name: SIZES[name] for name in REQUIRED})
    spec, config = read_both(tmp_path, minimal)
    assert_same(spec, config)
    assert (spec.rope.rope_type, spec.rope.rope_theta) == ("default", config.rope_parameters["rope_theta"])


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_frequencies_are_those_of_transformers_in_either_spelling(tmp_path, family, rope):
    kind, values, found = rope.split()[0], ROPES[rope], []
    sizes = config_of(family, **{**FULL, "hidden_act": "silu", "num_hidden_layers": 1})
    for spelling in (
        {"rope_parameters": {"rope_type": kind, "rope_theta": 5e4, **values}},
        {"rope_theta": 5e4, "rope_scaling": {"rope_type": kind, **values}},
        {"rope_theta": 5e4, "rope_scaling": {"type": kind, **values}},
    ):
        spec, config = read_both(tmp_path, {**sizes, **spelling})
        with torch.device("meta"):
            embedding = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
        expected = embedding(config)
        frequencies, factor = rope_frequencies(spec)
        assert torch.equal(frequencies, expected.inv_freq) and factor == expected.attention_scaling
        names = ("type", "rope_type", "rope_theta")
        scaling = {name: value for name, value in config.rope_parameters.items() if name not in names}
        assert spec.rope == Rope(kind, 5e4, tuple(sorted(scaling.items())))
        assert_same(spec, config)
        found.append(spec)
    assert found[0] == found[1] == found[2] and hash(found[0]) == hash(found[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformers_configuration_gives_the_spec_of_its_file(tmp_path, family):
    spec, config = read_both(tmp_path, config_of(family, **FULL, rope_theta=1_000_000))
    assert as_model_spec(config) == spec == as_model_spec(spec)
    config.save_pretrained(tmp_path)  # has the experts under another name
    assert read_model_spec(tmp_path) == spec
    assert family_for(config) is family_for(spec) is FAMILIES[family]
    assert type(spec.rope.rope_theta) is int  # converted checkpoints record it as it is


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_size": "48"}, "hidden_size='48' is not of type int"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers=True is not of type int"),
        ("llama", {"vocab_size": 0}, "vocab_size=0 is not positive"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps='small' is not of type float"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is not of type bool"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("llama", {"head_dim": 7}, "head_dim=7 is odd"),
        ("llama", {"head_dim": None, "num_attention_heads": 7}, "head_dim is missing"),
        ("qwen3_moe", {"num_experts": 2.0}, "num_experts=2.0 is not of type int"),
        ("qwen3", {"rope_parameters": 3}, "rope_parameters=3 is not of type dict"),
        ("qwen3", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ("qwen3", {"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling.factor='4' is not of type float"),
        (
            "qwen3",
            {"rope_scaling": {"type": "linear", "factor": True}},
            "rope_scaling.factor=True is not of type float",
        ),
        ("qwen3", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention={} is not of type"),
        ("qwen3", {"rope_theta": "1e6"}, "rope_parameters.rope_theta='1e6' is not of type float"),
    ],
)
def test_impossible_fields_are_named_with_their_file(tmp_path, family, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(config_of(family, **FULL) | changes))
    with pytest.raises(CheckpointError) as caught:
        read_model_spec(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {message}")
    assert str(caught.value).endswith("; copy the model again") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias=true"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true"),
        ("mistral", {"sliding_window": 16}, "sliding_window=16"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ],
)
def test_options_that_no_table_covers_are_refused(family, changes, message):
    with pytest.raises(ConfigError, match=f"^{message} in config.json of this {family} model is not covered; use a"):
        as_model_spec(config_of(family, **FULL) | changes)


def test_mistral_has_a_sliding_window_unless_its_file_says_otherwise(tmp_path):
    silent = {"model_type": "mistral", **FULL}
    (tmp_path / "config.json").write_text(json.dumps(silent))
    assert AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    with pytest.raises(ConfigError, match="sliding_window=4096"):
        read_model_spec(tmp_path)


def test_a_model_with_frequencies_that_depend_on_the_sequence_is_read_but_not_built():
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [2.0] * 5}
    spec = as_model_spec(config_of("llama", **FULL, rope_scaling=scaling))
    with pytest.raises(ConfigError, match="rope_type='longrope' .* covered: default, linear, llama3, yarn"):
        rope_frequencies(spec)


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("models/Qwen3-0.6B", "`hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B`, and give that folder"),
        ("Qwen/Qwen3-0.6B", "`hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B`, and give that folder"),
        ("/m/DeepSeek-R1-Distill-Qwen-7B", "`hf download deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --local-dir /m/Deep"),
        ("models/mine", "give a folder in Hugging Face format, with config.json (rlad downloads no models)"),
    ],
)
def test_a_missing_model_is_one_to_download(path, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_model_spec(path)
    assert f"{path}/config.json: not found; " in str(caught.value) and remedy in str(caught.value)
