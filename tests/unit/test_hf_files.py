"""Hugging Face folders: what is wrong with one is said by file and tensor; an export appears whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

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
