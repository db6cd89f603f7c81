"""Hugging Face folders: what is wrong with one is said by file and tensor; an export appears whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import OWN, SIZES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlad_megatron.cli import main
from rlad_megatron.config import LayoutConfig
from rlad_megatron.errors import CheckpointError
from rlad_megatron.models import safetensors_files
from rlad_megatron.models.load import HfCheckpoint, load_weights
from rlad_megatron.models.safetensors_files import export_hf
from rlad_megatron.models.shard_plan import build_shard_plan
from rlad_megatron.parallel.place import place_of

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 101,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False)).save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.model").write_bytes(b"carried along")
    return folder


@pytest.fixture
def copy(source, tmp_path):
    import shutil

    return shutil.copytree(source, tmp_path / "copy")


def plan_of(folder, layout=None):
    return build_shard_plan(AutoConfig.from_pretrained(folder), layout or LayoutConfig())


def test_a_sound_checkpoint_passes(source):
    assert (source / "model.safetensors.index.json").exists()
    HfCheckpoint(source).check(plan_of(source))


def test_missing_file_is_named(copy):
    victim = sorted(copy.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        HfCheckpoint(copy).check(plan_of(copy))


def test_truncated_file_is_named(copy):
    victim = sorted(copy.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{victim.name}: truncated"):
        HfCheckpoint(copy).check(plan_of(copy))


def rewrite(folder, change):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight.* is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(33)}), r"model.norm.weight.* has shape \(33,\)"),
        (lambda t: t.update({"visual.patch": torch.ones(3)}), "visual.patch.* is not in this model"),
    ],
)
def test_wrong_tensors_are_named(copy, change, message):
    rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message):
        HfCheckpoint(copy).check(plan_of(copy))


@pytest.mark.parametrize("layout", [LayoutConfig(1, 1), LayoutConfig(2, 1), LayoutConfig(2, 2)])
@pytest.mark.parametrize("shard_bytes", [10**9, 15_000])
def test_load_and_export_give_back_every_bit(source, tmp_path, monkeypatch, layout, shard_bytes):
    plan = plan_of(source, layout)
    checkpoint = HfCheckpoint(source)
    whole = {name: torch.full(shape, torch.nan) for name, shape in plan.hf_shapes.items()}
    for rank in range(layout.model_ranks):
        entries = plan.entries(place_of(rank, layout, layout.model_ranks))
        local = {entry.name: torch.full(entry.shape, torch.nan) for entry in entries}
        load_weights(local, entries, checkpoint)
        assert all(torch.isfinite(value).all() for value in local.values())  # padding is zeros
        for entry in entries:
            for piece in entry.pieces if entry.owner else ():
                target = tuple(slice(*bounds) for bounds in piece.hf_slices)
                whole[piece.hf_name][target] = local[entry.name][tuple(slice(*b) for b in piece.local_slices)]
    target = tmp_path / "out"
    monkeypatch.setattr(safetensors_files, "MAX_SHARD_BYTES", shard_bytes)
    export_hf(whole.items(), plan.hf_shapes, like=source, target=target, dtype=torch.float32, write=True)
    assert (target / "model.safetensors.index.json").exists() == (shard_bytes < 10**6)
    assert (target / "tokenizer.model").read_bytes() == b"carried along"
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    ours, theirs = (Qwen3ForCausalLM.from_pretrained(f, dtype=torch.float32).state_dict() for f in (target, source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_interrupted_export_leaves_nothing_under_the_name(source, tmp_path):
    def stream():
        yield "model.norm.weight", torch.ones(32)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        shapes = {"model.norm.weight": (32,)}
        export_hf(stream(), shapes, like=source, target=tmp_path / "out", dtype=torch.float32, write=True)
    assert not (tmp_path / "out").exists()


# --- models with a vision tower, and experts that are stored together ---


VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
}
WHOLE = {"qwen3_5_text": Qwen3_5Config, "qwen3_5_moe_text": Qwen3_5MoeConfig}


def rlad_convert(capsys, *arguments):
    """(exit code, stderr)"""
    capsys.readouterr()
    return main(["convert", *map(str, arguments)]), capsys.readouterr().err


def make_whole(folder, family):
    """A model with a vision tower, a layer for multi-token prediction, and experts stored together."""
    sizes = {name: value for name, value in (SIZES | OWN[family]).items() if name != "norm_topk_prob"}
    torch.manual_seed(0)
    config = WHOLE[family](text_config=sizes, vision_config=VISION, tie_word_embeddings=False)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.layers.0.input_layernorm.weight"] = torch.randn(sizes["hidden_size"])
    for layer in range(sizes["num_hidden_layers"] if "moe" in family else 0):
        path = f"model.language_model.layers.{layer}.mlp.experts."
        for stored, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            experts = [
                torch.cat([tensors.pop(f"{path}{expert}.{part}.weight") for part in parts])
                for expert in range(sizes["num_experts"])
            ]
            tensors[path + stored] = torch.stack(experts)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("family", WHOLE)
def test_the_text_model_of_a_whole_one_and_a_whole_one_again(tmp_path, capsys, family):
    whole, text, again = (tmp_path / name for name in ("whole", "text", "again"))
    expected = make_whole(whole, family)
    code, said = rlad_convert(capsys, "hf-to-hf", whole, text)
    left_out = sum(name.startswith(("model.visual.", "mtp.")) for name in expected)
    assert code == 0
    assert f"model {whole}: {left_out} tensors of model.visual and mtp are left out" in said and said.count("\n") == 1
    # transformers takes both for the same model.
    tokens = torch.tensor([[5, 1, 998, 7, 7]])
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(text)(tokens).logits
        theirs = AutoModelForImageTextToText.from_pretrained(whole)(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert AutoConfig.from_pretrained(text).model_type == family
    # Another text model in the place of the first.
    changed = {name: tensor + 1 for name, tensor in load_file(text / "model.safetensors").items()}
    save_file(changed, text / "model.safetensors", metadata={"format": "pt"})
    (text / "digests.json").unlink()
    assert rlad_convert(capsys, "hf-to-hf", text, again, "--like", whole) == (0, "")
    result = load_file(again / "model.safetensors")
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(result[name], tensor + (not name.startswith(("model.visual.", "mtp.")))), name
    assert json.loads((again / "config.json").read_text()) == json.loads((whole / "config.json").read_text())
    code, said = rlad_convert(capsys, "hf-to-hf", whole, tmp_path / "other", "--like", text)
    assert code == 2 and said.endswith(
        f"--like {text}: has no vision tower or other weights to carry along; leave it out\n"
    )
