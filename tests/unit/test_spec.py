"""A spec read from config.json has the values that transformers reads from it."""

import dataclasses
import json

import pytest
import torch
from tiny_models import EXPERTS, SIZES
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.config_fields import ONLY, ROPE_ONLY
from rlad_megatron.models.config_json import print_unknown_fields, read_model_spec
from rlad_megatron.models.registry import FAMILIES, as_model_spec, family_for
from rlad_megatron.models.rope import rope_frequencies
from rlad_megatron.models.spec import Rope

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Every field that is read, none at its default.
FULL = {**SIZES, **EXPERTS, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16, "truncate": False},
    "yarn without length": {"factor": 4.0, "attention_factor": 1.25},
}


WITH_EXPERTS = ("qwen3_moe", "qwen3_5_moe_text")
HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text")
# Of a rotary embedding, read or without effect in hybrids.
PARTIAL = ("partial", "sections", "interleaved")


def config_of(family, **fields):
    if family in HYBRIDS:
        fields.pop("norm_topk_prob", None)  # transformers has no such field there
        return {"model_type": family, **fields}
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
        "ffn_size": getattr(config, "intermediate_size", None) or config.moe_intermediate_size,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads,
        # As the models of transformers read it.
        "head_dim": getattr(config, "head_dim", config.hidden_size // heads),
        "vocab_size": config.vocab_size,
        "tied": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
    }
    if config.model_type in WITH_EXPERTS:
        expected |= {
            "num_experts": config.num_experts,
            "expert_ffn_size": config.moe_intermediate_size,
            "experts_per_token": config.num_experts_per_tok,
            "norm_topk_prob": getattr(config, "norm_topk_prob", True),
            "shared_expert_ffn_size": getattr(config, "shared_expert_intermediate_size", 0),
        }
    if config.model_type in HYBRIDS:
        expected |= {
            "gdn_key_heads": config.linear_num_key_heads,
            "gdn_value_heads": config.linear_num_value_heads,
            "gdn_key_head_dim": config.linear_key_head_dim,
            "gdn_value_head_dim": config.linear_value_head_dim,
            "gdn_conv_width": config.linear_conv_kernel_dim,
            "layer_types": tuple(config.layer_types),
        }
    else:
        expected["layer_types"] = ("full_attention",) * config.num_hidden_layers
    assert {name: getattr(spec, name) for name in expected} == expected
    assert type(spec.rms_norm_eps) is type(config.rms_norm_eps)
    assert (spec.num_experts > 0) == (config.model_type in WITH_EXPERTS)
    assert (spec.gdn_key_heads > 0) == (config.model_type in HYBRIDS)


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
    if family in HYBRIDS and kind == "yarn":
        message = refusal(tmp_path, config_of(family, **FULL, rope_parameters={"rope_type": kind, **values}))
        assert "rope_type='yarn' with partial_rotary_factor=0.25" in message
        return
    sizes = config_of(family, **{**FULL, "num_hidden_layers": 1})
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
        names = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
        scaling = {name: value for name, value in config.rope_parameters.items() if name not in names}
        share = 0.25 if family in HYBRIDS else 1.0
        assert spec.rope == Rope(kind, 5e4, tuple(sorted(scaling.items())), share)
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
        ("qwen3", {"rope_theta": "1e6"}, "rope_parameters.rope_theta='1e6' is not of type float"),
    ],
)
def test_impossible_fields_are_named_with_their_file(tmp_path, family, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(config_of(family, **FULL) | changes))
    with pytest.raises(CheckpointError) as caught:
        read_model_spec(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {message}")
    assert str(caught.value).endswith("; copy the model again") and "\n" not in str(caught.value)


# A value that is not covered, and what the message offers.
REFUSED = {
    "hidden_act": ("gelu", 'use a model with hidden_act="silu"'),
    "bias": (True, "use a model with bias=false"),
    "mlp_bias": (True, "use a model with mlp_bias=false"),
    "is_causal": (False, "use a model with is_causal=true"),
    "use_bidirectional_attention": (True, "use a model with use_bidirectional_attention=false"),
    "is_encoder_decoder": (True, "use a model with is_encoder_decoder=false"),
    "add_cross_attention": (True, "use a model with add_cross_attention=false"),
    "use_sliding_window": (True, "use a model with use_sliding_window=false"),
    "layer_types": (["full_attention", "sliding_attention"], 'use a model with layer_types=["full_attention"]'),
    "attention_chunk_size": (8, "use a model with attention_chunk_size=null"),
    "dual_chunk_attention_config": ({"chunk_size": 8}, "use a model with dual_chunk_attention_config=null"),
    "partial_rotary_factor": (0.5, "use a model with partial_rotary_factor=1.0"),
    "rope_interleaved": (True, "use a model with rope_interleaved=false"),
    "use_mrope": (True, "use a model with use_mrope=false"),
    "logit_scale": (0.25, "use a model with logit_scale=1.0"),
    "pruned_heads": ({"0": [1]}, "use a model with pruned_heads={}"),
    "per_layer_config": ({"0": {"head_dim": 8}}, "use a model with per_layer_config=null"),
    "quantization_config": ({"quant_method": "fp8"}, "convert the model to bf16 first"),
    "compression_config": ({"format": "int4"}, "convert the model to bf16 first"),
    "transformers_weights": ("other.safetensors", "name the weights as usual (model.safetensors) and remove the field"),
    "auto_map": (
        {"AutoModelForCausalLM": "modeling.Mine"},
        "code of the model never runs here; if it computes what transformers' class does, remove the field",
    ),
}
NO_BIAS = {
    "attention_bias": (True, "use a model with attention_bias=false"),
    "qkv_bias": (True, "use a model with qkv_bias=false"),
}
NO_WINDOW = {"sliding_window": (16, "use a model with sliding_window=null")}
REFUSED_BY = {
    "llama": NO_BIAS
    | NO_WINDOW
    | {
        "architectures": (
            ["LlamaForSequenceClassification"],
            'use a model with architectures=["LlamaForCausalLM", "LLaMAForCausalLM"]',
        )
    },
    "mistral": NO_BIAS
    | NO_WINDOW
    | {"architectures": (["LlamaForCausalLM"], 'use a model with architectures=["MistralForCausalLM"]')},
    "qwen2": {
        "qk_norm": (True, "use a model with qk_norm=false"),
        "architectures": (["Qwen2Model"], 'use a model with architectures=["Qwen2ForCausalLM"]'),
    },
    "qwen3": NO_BIAS | {"architectures": (["Qwen3Model"], 'use a model with architectures=["Qwen3ForCausalLM"]')},
    "qwen3_moe": NO_BIAS
    | {
        "use_qk_norm": (False, "use a model with use_qk_norm=true"),
        "mlp_only_layers": ([0], "use a model with mlp_only_layers=[]"),
        "decoder_sparse_step": (2, "use a model with decoder_sparse_step=1"),
        "shared_expert_intermediate_size": (64, "use a model with shared_expert_intermediate_size=0"),
        "scoring_func": ("sigmoid", 'use a model with scoring_func="softmax"'),
        "architectures": (["Qwen3Model"], 'use a model with architectures=["Qwen3MoeForCausalLM"]'),
    },
}
_OF_HYBRIDS = {
    "attention_bias": (True, "use a model with attention_bias=false"),
    "attn_output_gate": (False, "use a model with attn_output_gate=true"),
    "layer_types": (["mamba"] * 7, 'use a model with layer_types=["linear_attention", "full_attention"]'),
    "mamba_ssm_dtype": ("bfloat16", 'use a model with mamba_ssm_dtype="float32"'),
    "mlp_only_layers": ([0], "use a model with mlp_only_layers=[]"),
}
REFUSED_BY |= {
    "qwen3_5_text": _OF_HYBRIDS
    | {"architectures": (["Qwen3_5ForX"], 'use a model with architectures=["Qwen3_5ForCausalLM"]')},
    "qwen3_5_moe_text": _OF_HYBRIDS
    | {
        "norm_topk_prob": (False, "use a model with norm_topk_prob=true"),
        "architectures": (["Qwen3_5ForX"], 'use a model with architectures=["Qwen3_5MoeForCausalLM"]'),
    },
}
REFUSED_ROPES = {
    "dynamic": ({"type": "dynamic", "factor": 2.0}, "rope_type='dynamic'"),
    "longrope": (
        {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [2.0] * 5},
        "rope_type='longrope'",
    ),
    "its old name": ({"type": "su", "factor": 2.0}, "rope_type='su'"),
    "proportional": ({"rope_type": "proportional"}, "rope_type='proportional'"),
    "partial": ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "rope_dim": ({"rope_type": "default", "rope_dim": 4}, "rope_dim=4"),
    "sections": ({"type": "default", "mrope_section": [1, 2, 2]}, "mrope_section=[1, 2, 2]"),
    "interleaved": ({"type": "default", "mrope_interleaved": True}, "mrope_interleaved=true"),
    "fope": ({"type": "default", "use_fope": True}, "use_fope=true"),
    "of kinds of layers": ({"full_attention": {"rope_theta": 1e6}}, 'full_attention={"rope_theta": 1000000.0}'),
    "of windows": ({"sliding_attention": {}}, "sliding_attention={}"),
}


def refusal(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        read_model_spec(folder)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_changes_the_arithmetic_is_refused_by_name(tmp_path, family):
    refused = REFUSED | REFUSED_BY[family]
    assert refused.keys() == ONLY.keys() | FAMILIES[family].only.keys()
    if family in HYBRIDS:
        del refused["partial_rotary_factor"]
    where = f"in {tmp_path / 'config.json'} of this {family} model is not covered"
    for name, (value, remedy) in refused.items():
        message = refusal(tmp_path, config_of(family, **FULL) | {name: value})
        assert message == f"{name}={json.dumps(value)} {where}; {remedy}"
    # Off, spelled out.
    for name, off in {**ONLY, **FAMILIES[family].only}.items():
        if name not in refused or name in ("layer_types", "norm_topk_prob"):  # these are read too
            continue
        for value in (off, None):
            assert as_model_spec(config_of(family, **FULL) | {name: value}) == as_model_spec(config_of(family, **FULL))
    assert as_model_spec(config_of(family, **FULL, layer_types=["full_attention"] * 7))


@pytest.mark.parametrize("rope", REFUSED_ROPES)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_embeddings_that_are_not_covered_are_refused(tmp_path, family, key, rope):
    assert ROPE_ONLY.keys() <= {name for parameters, _ in REFUSED_ROPES.values() for name in parameters}
    if family in HYBRIDS and rope in PARTIAL:
        pytest.skip("partial rotation is read, and sections have no effect on text")
    parameters, shown = REFUSED_ROPES[rope]
    message = refusal(tmp_path, config_of(family, **FULL, **{key: parameters}))
    assert message.startswith(f"{key}.{shown} in {tmp_path / 'config.json'} of this {family} model is not covered; ")
    assert "\n" not in message
    if "rope_type" in shown:
        assert message.endswith("; covered: default, linear, llama3, yarn")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_of_transformers_is_unknown(tmp_path, family):
    """All fields that the installed transformers gives the family, and those of sampling, which older files have."""
    full = {name: value for name, value in FULL.items() if name != "norm_topk_prob" or family not in HYBRIDS}
    config = AutoConfig.for_model(family, **full, **({"sliding_window": None} if family == "mistral" else {}))
    for name in EXPERTS.keys() & full.keys() if family not in WITH_EXPERTS else ():
        delattr(config, name)
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.keys() >= {field.name for field in dataclasses.fields(config)} - {"num_experts"}
    assert read_model_spec(tmp_path).unknown_fields == ()
    sampling = dict.fromkeys(GenerationConfig._get_default_generation_params(), 1)
    old = {"torch_dtype": "bfloat16", "rope_theta": 1e6, "rope_scaling": None, "original_max_position_embeddings": 64}
    assert as_model_spec(written | sampling | old).unknown_fields == ()


def test_the_full_file_of_a_published_model_has_no_unknown_field():
    """SmolLM2-135M-Instruct, the base of many small students: it has fields that transformers' class does not."""
    smollm2 = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 49152,
    }
    assert as_model_spec(smollm2).unknown_fields == ()


def test_unknown_fields_are_kept_in_words_and_named_once(tmp_path, capsys):
    config = config_of(
        "llama", **SIZES, foo=1, bar={"a": [1] * 99}, rope_scaling={"type": "linear", "factor": 2.0, "x": 3}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_model_spec(tmp_path)
    assert [field[:5] for field in spec.unknown_fields] == ["bar={", "foo=1", "rope_"]
    assert spec.unknown_fields[1:] == ("foo=1", "rope_scaling.x=3") and len(spec.unknown_fields[0]) < 90
    assert capsys.readouterr() == ("", "")  # reading prints nothing
    for _ in range(2):
        print_unknown_fields("models/mine", spec)
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert error.startswith("model models/mine: config.json has fields this version does not know: bar={")
    assert ", foo=1, rope_scaling.x=3; `rlad convert`" in error
    print_unknown_fields("models/other", as_model_spec(config_of("llama", **SIZES)))
    assert capsys.readouterr().err == ""


def test_mistral_has_a_sliding_window_unless_its_file_says_otherwise(tmp_path):
    silent = {"model_type": "mistral", **FULL}
    (tmp_path / "config.json").write_text(json.dumps(silent))
    assert AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    with pytest.raises(ConfigError, match="sliding_window=4096"):
        read_model_spec(tmp_path)


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
