"""Conversion: bit-exact round trips, resharding, and what bad input gets."""

import ctypes
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from transformers import LlamaConfig

from rlad_megatron.cli import main
from rlad_megatron.config import LayoutConfig
from rlad_megatron.convert import logits, targets
from rlad_megatron.convert.layout import CheckpointLayout, rank_chunks, split_evenly
from rlad_megatron.convert.run import check_space, convert, verify_folders
from rlad_megatron.convert.targets import Conversion
from rlad_megatron.convert.workers import start
from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.checkpoint_files import digests_of, find_damage, read_digests
from rlad_megatron.models.config_json import print_unknown_fields, read_model_spec
from rlad_megatron.models.load import HfCheckpoint, load_weights, open_checkpoint
from rlad_megatron.models.megatron_folder import find_iteration
from rlad_megatron.models.megatron_tensors import model_blocks
from rlad_megatron.models.safetensors_files import SafetensorsFiles
from rlad_megatron.models.shard_plan import build_shard_plan
from rlad_megatron.models.torch_dist import MegatronCheckpoint, read_metadata
from rlad_megatron.parallel.place import place_of

QUIET = Console(quiet=True)
DENSE = [(tp, pp, 1, 1) for tp in (1, 2, 4) for pp in (1, 2, 3)]  # 7 layers: the stages of PP 2 and 3 are uneven
SOME = [(1, 1, 1, 1), (2, 3, 1, 1), (4, 2, 1, 1)]
EXPERT = [(1, 1, 1, 2), (2, 1, 1, 2), (1, 3, 1, 2), (4, 2, 1, 2)]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A function that makes a model once: (family, tied, other changes) -> folder."""
    made = {}

    def make(family, tied=False, **changes):
        key = (family, tied, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = make_model(folder, family, tie_word_embeddings=tied, **changes)
            (folder / "tokenizer.model").write_bytes(b"carried along")
        return made[key]

    return make


def to_megatron(source, target, layout=(1, 1, 1, 1), config=None, **options):
    convert(
        Conversion(str(source), str(target), str(config or source), CheckpointLayout(*layout), **options),
        QUIET,
        verify=False,
    )
    return target


def to_hf(source, target, config=None, **options):
    convert(Conversion(str(source), str(target), str(config or source), None, **options), QUIET, verify=False)
    return target


def tensors(folder):
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_exact(hf, tmp_path, family, tied):
    source = hf(family, tied)
    # Fewer where another family has the parameters too or EXPERT adds layouts, and for tying, which changes one.
    layouts = SOME if tied or family in ("llama", "mistral", "qwen3_5_moe_text") else DENSE
    if "moe" in family:
        layouts = EXPERT if tied else layouts + EXPERT
    for layout in layouts:
        megatron = to_megatron(source, tmp_path / "megatron", layout)
        back = to_hf(megatron, tmp_path / "back")
        assert_same(source, back)
        stored = MegatronCheckpoint(megatron, read_model_spec(source)).metadata.state_dict_metadata
        assert stored["embedding.word_embeddings.weight"].size[0] == {1: 1024, 2: 1024, 4: 1024}[layout[0]]
        assert ("output_layer.weight" in stored) == (not tied)  # written once
        shutil.rmtree(megatron)
        shutil.rmtree(back)
    assert ("lm_head.weight" in tensors(source)) == (not tied)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_with_virtual_stages(hf, tmp_path, family):
    source = hf(family)
    layout = (2, 2, 2, 2 if "moe" in family else 1)
    assert_same(source, to_hf(to_megatron(source, tmp_path / "megatron", layout), tmp_path / "back"))
    stages = {
        rank // (layout[0] * layout[3]): {chunk.block.place[0] for chunk in chunks if chunk.block.place}
        for rank, chunks in enumerate(rank_chunks(read_model_spec(source), CheckpointLayout(*layout)))
    }
    assert stages == {0: {0, 1, 4, 5}, 1: {2, 3, 6}}  # chunks of 2, 2, 2 and 1 of the 7 layers go round the stages


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chunks_of_every_layout_tile_the_model_once(hf, family):
    spec = read_model_spec(hf(family))
    sizes = {(block.key, block.index): block for block in model_blocks(spec)}
    for layout in itertools.product((1, 2, 4), (1, 2, 3), (1, 2), (1, 2)):
        tp, pp, vpp, ep = layout
        if (vpp > 1 and pp == 1) or (ep > 1 and "moe" not in family):
            continue
        seen = {at: torch.zeros(block.stored_shape(tp), dtype=torch.int8) for at, block in sizes.items()}
        for chunks in rank_chunks(spec, CheckpointLayout(*layout)):
            for chunk in chunks:
                covered = seen[chunk.block.key, chunk.block.index][chunk.box.slices]
                assert covered.shape == chunk.box.sizes
                covered += 1
        assert all((counts == 1).all() for counts in seen.values()), layout


def test_more_ranks_than_key_value_heads(hf, tmp_path):
    source = hf("llama", num_key_value_heads=2)
    assert_same(source, to_hf(to_megatron(source, tmp_path / "megatron", (4, 1, 1, 1)), tmp_path / "back"))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_reshard_equals_conversion_by_way_of_hf(hf, tmp_path, family):
    source = hf(family, tied=family == "qwen3")
    layouts = [(1, 1, 1, 1), (2, 3, 1, 1), (4, 2, 1, 2 if family == "qwen3_moe" else 1)]
    direct = [to_megatron(source, tmp_path / f"direct{i}", layout) for i, layout in enumerate(layouts)]
    for i, first in enumerate(direct):
        for j, layout in enumerate(layouts):
            resharded = to_megatron(first, tmp_path / f"{i}to{j}", layout)
            files = sorted(path.relative_to(direct[j]) for path in direct[j].rglob("*.distcp"))
            assert files == sorted(path.relative_to(resharded) for path in resharded.rglob("*.distcp"))
            for file in files:
                assert (resharded / file).read_bytes() == (direct[j] / file).read_bytes(), (i, j, file)


def test_two_processes_write_what_one_writes(hf, tmp_path):
    source = hf("qwen3_moe")
    two = to_megatron(source, tmp_path / "two", (2, 1, 1, 1), processes=2)
    verify_folders(QUIET, source, str(two), read_model_spec(source), sample=False)
    small = to_hf(two, tmp_path / "small", processes=2, max_shard_bytes=100_000)
    assert len(list(small.glob("*.safetensors"))) > 3
    assert_same(source, small)
    index = json.loads((small / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(source).keys()
    assert (small / "tokenizer.model").read_bytes() == b"carried along"
    HfCheckpoint(small).check(build_shard_plan(read_model_spec(small), LayoutConfig()))


def read_padding(folder, spec):
    """The rows of the embedding that are the vocabulary's padding."""
    checkpoint = MegatronCheckpoint(folder, replace(spec, vocab_size=1024))
    return checkpoint.read_block(checkpoint.blocks[0])[spec.vocab_size :]


def test_dtype_is_settable_and_padding_is_zero(hf, tmp_path):
    source = hf("llama")
    megatron = to_megatron(source, tmp_path / "megatron", (4, 1, 1, 1), dtype="bfloat16", iteration="50")
    assert (megatron / "latest_checkpointed_iteration.txt").read_text() == "50"
    folder, iteration = find_iteration(megatron)
    assert (folder.name, iteration) == ("iter_0000050", "50")
    padding = read_padding(megatron, read_model_spec(source))
    assert padding.shape == (1024 - 1003, 48) and not padding.any()
    back = to_hf(megatron, tmp_path / "back", dtype="float32")
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"
    result = tensors(back)
    for name, tensor in tensors(source).items():
        assert torch.equal(result[name], tensor.bfloat16().float()), name
    verify_folders(QUIET, source, str(megatron), read_model_spec(source), sample=False)  # the same after rounding


def test_the_trainer_loads_a_megatron_checkpoint_in_another_layout(hf, tmp_path):
    source = hf("qwen3", tied=True)
    megatron = to_megatron(source, tmp_path / "megatron", (2, 3, 1, 1))
    spec = read_model_spec(megatron)
    plan = build_shard_plan(spec, LayoutConfig(4, 2))
    for rank in range(8):
        entries, loaded = plan.entries(place_of(rank, plan.layout, 8)), []
        for checkpoint in (HfCheckpoint(source), MegatronCheckpoint(megatron, spec)):
            local = {entry.name: torch.full(entry.shape, torch.nan) for entry in entries}
            load_weights(local, entries, checkpoint)
            loaded.append(local)
        assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])


def test_work_is_dealt_evenly():
    for sizes in ([5, 1, 1, 1, 1, 1], [1] * 10, [7], [3, 3, 100, 1]):
        for parts in (1, 2, 3, 8):
            runs = split_evenly(sizes, parts)
            assert [i for run in runs for i in run] == list(range(len(sizes))) and len(runs) == parts
            assert max(sum(sizes[i] for i in run) for run in runs) <= sum(sizes) / parts + max(sizes)


def in_a_process(function):
    """Run a function in a fork of this process, without the seconds that a new interpreter would take; its exit code.

    What the function raises becomes exit code 1.
    """

    def body():
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        function()

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(300)
    return process.exitcode


def peaks_of_all_ways(source, folder):
    """Bytes held at most beyond those before: converted, resharded to TP 1, and converted back."""

    def resident(field):
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])

    one, two, back = (str(folder / name) for name in ("one", "two", "back"))
    model, peaks = str(source), []
    for way in (
        Conversion(model, two, model, CheckpointLayout(2, 1)),
        Conversion(two, one, model, CheckpointLayout(1, 1)),
        Conversion(one, back, model, None),
    ):
        ctypes.CDLL(None).malloc_trim(0)  # blocks that were freed but kept would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        start = resident("VmRSS")
        convert(way, QUIET, verify=True)
        peaks.append(resident("VmHWM") - start)
    return peaks


def test_memory_stays_near_the_largest_parameter(hf, tmp_path):
    """315 MB are converted, resharded, converted back and verified with 2 x the largest parameter + 170 MB.

    The bar is 300 MB. TP 1 is the worst layout, because a chunk is a whole parameter there. A third copy adds 92. In a
    process of its own, since one that has run other tests holds on to memory of theirs.
    """
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, vocab_size=22528)
    config.architectures = ["LlamaForCausalLM"]
    source = tmp_path / "source"
    config.save_pretrained(source)
    shapes = build_shard_plan(config, LayoutConfig()).hf_shapes
    files = SafetensorsFiles(source, {name: (shape, torch.float32) for name, shape in shapes.items()}, 10**8)
    files.create()  # zeros
    largest = 22528 * 1024 * 4
    assert files.total_bytes > 310e6 > 3 * largest

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(peaks_of_all_ways, (hf("llama"), tmp_path / "small"))  # so that the libraries are in memory
        used = pool.apply(peaks_of_all_ways, (source, tmp_path / "large"))
    assert 0 < max(used) < 2 * largest + 170e6, [f"{peak / 1e6:.0f} MB" for peak in used]


# --- verify ---


def rewrite(folder, change):
    """Change the tensors of a folder with one safetensors file."""
    held = tensors(folder)
    change(held)
    save_file(held, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of `rlad convert ...`."""
    capsys.readouterr()
    code = main(["convert", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_verify_names_the_tensor_that_differs(hf, tmp_path, capsys):
    source = hf("qwen3", tied=True)
    megatron = to_megatron(source, tmp_path / "megatron", (2, 1, 1, 1))
    for options, said in (((), "verified: 79 of 79 "), (("--sample",), "verified a sample: 13 of 79 ")):
        code, out, _ = run(capsys, "verify", source, megatron, *options)
        assert code == 0 and f"{said}tensors, all identical\n" in out, out
    other = shutil.copytree(source, tmp_path / "other")
    rewrite(other, lambda held: held["model.layers.4.self_attn.v_proj.weight"][3, 5].add_(0.25))
    code, out, error = run(capsys, "verify", other, megatron)
    assert code == 2
    assert "model.layers.4.self_attn.v_proj.weight: largest difference 0.25" in out
    assert error.count("\n") == 1 and "1 of 79 tensors" in error


def test_a_conversion_that_permutes_does_not_pass_its_own_check(hf, tmp_path, monkeypatch):
    from rlad_megatron.models.rules import Rule

    source = hf("llama")
    right = Rule.uncut

    def wrong(self, spec):
        full, pieces = right(self, spec)
        local = [piece.local_slices for piece in pieces]
        if self.cut == "kv_heads":  # value and key change places: still a tiling
            local[1], local[2] = local[2], local[1]
        return full, tuple(
            type(piece)(piece.hf_name, piece.hf_slices, slices) for piece, slices in zip(pieces, local, strict=True)
        )

    monkeypatch.setattr(Rule, "uncut", wrong)
    conversion = Conversion(source, str(tmp_path / "megatron"), source, CheckpointLayout(2, 1))
    with pytest.raises(CheckpointError, match="self_attn.k_proj.weight"):
        convert(conversion, QUIET, verify=True)
    assert not list(tmp_path.iterdir())


# --- bad input: one line, exit code 2, nothing left behind ---


@pytest.fixture
def copy(hf, tmp_path):
    return Path(shutil.copytree(hf("qwen3", tied=True), tmp_path / "copy"))


def assert_refused(capsys, tmp_path, verb, source, message, *options):
    before = sorted(tmp_path.iterdir())
    code, _, error = run(capsys, verb, source, tmp_path / "target", *options)
    assert code == 2 and error.startswith("rlad: ") and error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "'model.layers.1.mlp.up_proj.weight' is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(49)}), "'model.norm.weight' has shape (49,)"),
        (lambda t: t.update({"visual.patch": torch.ones(3)}), "'visual.patch' is not in this model"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
            "model.safetensors: tensor 'model.norm.weight' has dtype I8",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(88, 48, dtype=torch.float16)}),
            "'model.layers.2.mlp.gate_proj.weight' (torch.float32) and 'model.layers.2.mlp.up_proj.weight'",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.down_proj.weight": torch.ones(48, 88, dtype=torch.float16)}),
            "'model.layers.2.mlp.down_proj.weight' has torch.float16, but that of another layer torch.float32",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            "model.safetensors: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight', though",
        ),
    ],
)
def test_wrong_tensors(copy, tmp_path, capsys, change, message):
    rewrite(copy, change)
    assert_refused(capsys, tmp_path, "hf-to-megatron", copy, message)


def test_a_tied_head_that_is_written_all_the_same(copy, tmp_path):
    rewrite(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    back = to_hf(to_megatron(copy, tmp_path / "megatron"), tmp_path / "back")
    assert tensors(copy).keys() - tensors(back).keys() == {"lm_head.weight"}


@pytest.mark.parametrize("verb", ["hf-to-megatron", "megatron-to-hf"])
def test_values_that_float16_cannot_hold(copy, tmp_path, capsys, verb):
    rewrite(copy, lambda t: t["model.layers.3.mlp.up_proj.weight"][5, 7].fill_(70000.0))
    source = copy if verb == "hf-to-megatron" else to_megatron(copy, tmp_path / "megatron", (2, 1, 1, 1))
    message = "tensor 'model.layers.3.mlp.up_proj.weight' has values that float16 cannot hold"
    assert_refused(capsys, tmp_path, verb, source, message, "--dtype=float16")


def test_missing_and_truncated_files(hf, copy, tmp_path, capsys):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-100])
    assert_refused(capsys, tmp_path, "hf-to-megatron", copy, "model.safetensors: truncated")
    (copy / "model.safetensors").unlink()
    assert_refused(capsys, tmp_path, "hf-to-megatron", copy, "neither model.safetensors nor")
    megatron = to_megatron(hf("qwen3", tied=True), tmp_path / "megatron", (2, 1, 1, 1))
    file = megatron / "release" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(capsys, tmp_path, "megatron-to-hf", megatron, "__1_0.distcp: truncated")
    file.unlink()
    assert_refused(capsys, tmp_path, "megatron-to-hf", megatron, "__1_0.distcp: not found")
    (megatron / "release" / ".metadata").write_bytes(b"damaged")
    message = "release/.metadata: cannot be read"
    assert_refused(capsys, tmp_path, "megatron-to-hf", megatron, message)
    code, _, error = run(capsys, "inspect", megatron)
    assert code == 2 and message in error and error.count("\n") == 1
    (megatron / "release" / "metadata.json").write_text("{")
    assert_refused(capsys, tmp_path, "megatron-to-hf", megatron, "release/metadata.json: not valid JSON")
    (megatron / "latest_checkpointed_iteration.txt").write_text("70")
    assert_refused(capsys, tmp_path, "megatron-to-hf", megatron, "iter_0000070: .metadata not found")
    (megatron / "iter_0000070" / "mp_rank_00").mkdir(parents=True)
    assert_refused(capsys, tmp_path, "megatron-to-hf", megatron, "iter_0000070: format 'torch' is not covered")


def test_damaged_bytes(hf, tmp_path, capsys):
    megatron = to_megatron(hf("qwen3", tied=True), tmp_path / "megatron")
    file = megatron / "release" / "__0_0.distcp"
    whole = file.read_bytes()
    (megatron / "release" / "digests.json").rename(tmp_path / "digests.json")  # as a checkpoint from elsewhere
    file.write_bytes(bytes(len(whole)))
    message = "release/__0_0.distcp: tensor 'embedding.word_embeddings.weight' cannot be read"
    assert_refused(capsys, tmp_path, "megatron-to-hf", megatron, message)
    (tmp_path / "digests.json").rename(megatron / "release" / "digests.json")
    file.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    message = "release/__0_0.distcp: damaged: it has another digest"
    assert_refused(capsys, tmp_path, "reshard", megatron, message, "--no-verify")
    code, _, error = run(capsys, "verify", megatron, megatron, "--sample")
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_conversion_keeps_the_digests_of_both_sides(hf, tmp_path):
    source = hf("qwen3", tied=True)
    megatron = to_megatron(source, tmp_path / "megatron", (2, 1, 1, 1)) / "release"
    back = to_hf(megatron, tmp_path / "back", config=source, max_shard_bytes=100_000)
    assert read_digests(megatron).keys() == {path.name for path in megatron.iterdir()} - {"digests.json"}
    assert read_digests(megatron, "source") == digests_of(Path(source), ["model.safetensors"])
    assert read_digests(back, "source") == read_digests(megatron)
    assert read_digests(back).keys() == {path.name for path in back.glob("*.safetensors*")}
    assert find_damage(megatron) is None and find_damage(back) is None
    again = to_hf(to_megatron(back, tmp_path / "again"), tmp_path / "third")
    assert read_digests(again).keys() == {"model.safetensors"}  # its own, not those of the folder it was made from


class Hostile:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("place", ["whole", "planner_data", "relative_path"])
def test_a_hostile_metadata_runs_nothing(hf, tmp_path, capsys, place):
    megatron = to_megatron(hf("qwen3", tied=True), tmp_path / "megatron")
    file, proof = megatron / "release" / ".metadata", tmp_path / "proof"
    content = pickle.loads(file.read_bytes())
    if place == "whole":
        content = Hostile(proof)
    elif place == "planner_data":
        content.planner_data = {"x": Hostile(proof)}
    else:
        next(iter(content.storage_data.values())).relative_path = Hostile(proof)
    file.write_bytes(pickle.dumps(content))
    for verb in (["inspect"], ["verify", hf("qwen3", tied=True)], ["megatron-to-hf", tmp_path / "target"]):
        code, _, error = run(capsys, verb[0], megatron, *verb[1:])
        assert code == 2 and error.count("\n") == 1, error
        assert f"{file}: cannot be read (UnpicklingError: posix.system is not part of" in error
        with pytest.raises(CheckpointError, match="posix.system is not part"):
            open_checkpoint(megatron, read_model_spec(hf("qwen3", tied=True)))
    assert not proof.exists()


def test_a_metadata_of_an_older_megatron_core(hf, tmp_path):
    """Up to 0.15 it had classes of its own there."""
    folder = to_megatron(hf("qwen3", tied=True), tmp_path / "megatron") / "release"
    content = read_metadata(folder)
    content.planner_data = SavePlan([])
    module = "megatron.core.dist_checkpointing.strategies.torch"
    pickled = pickle.dumps(content, protocol=2)
    for kind in (Metadata, SavePlan):
        name = f"c{kind.__module__}\n{kind.__name__}\n".encode()
        assert name in pickled
        pickled = pickled.replace(name, f"c{module}\nMCore{kind.__name__}\n".encode())
    (folder / ".metadata").write_bytes(pickled)
    assert read_metadata(folder) == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "../x"), "'../x' is not the name of"),
        (lambda m: setattr(m, "storage_data", None), "cannot be read (AttributeError"),
        (lambda m: setattr(m, "state_dict_metadata", [7]), "cannot be read (AttributeError"),
    ],
)
def test_a_metadata_that_makes_no_sense(hf, tmp_path, capsys, change, message):
    megatron = to_megatron(hf("qwen3", tied=True), tmp_path / "megatron")
    file = megatron / "release" / ".metadata"
    content = pickle.loads(file.read_bytes())
    change(content)
    file.write_bytes(pickle.dumps(content))
    assert_refused(capsys, tmp_path, "megatron-to-hf", megatron, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("verb", ["hf-to-megatron", "megatron-to-hf", "verify"])
def test_weights_that_are_not_finite_are_named(copy, tmp_path, capsys, monkeypatch, verb, value):
    rewrite(copy, lambda t: t["model.layers.3.mlp.up_proj.weight"][5, 7].fill_(value))
    message = f"{copy}: tensor 'model.layers.3.mlp.up_proj.weight' has NaN or infinite values"
    if verb == "hf-to-megatron":
        assert_refused(capsys, tmp_path, verb, copy, message)
        return
    with monkeypatch.context() as patch:
        patch.setattr("rlad_megatron.convert.megatron_files.is_finite", lambda tensor: True)
        megatron = to_megatron(copy, tmp_path / "megatron")
    if verb == "verify":
        code, _, error = run(capsys, "verify", copy, megatron)
        assert code == 2 and message in error
    else:
        message = message.replace(str(copy), str(megatron / "release"))
        for dtype in ("keep", "float16"):
            assert_refused(capsys, tmp_path, verb, megatron, message, f"--dtype={dtype}")


def test_an_index_that_is_wrong(hf, copy, tmp_path, capsys):
    index = copy / "model.safetensors.index.json"
    for content, message in (
        ("{", "model.safetensors.index.json: has no readable weight_map"),
        ('{"weight_map": 3}', "model.safetensors.index.json: has no readable weight_map"),
        ('{"weight_map": {"a": 3}}', "model.safetensors.index.json: 3 is not the name of a file next to it"),
        ('{"weight_map": {"a": "../copy/model.safetensors"}}', "'../copy/model.safetensors' is not the name of a file"),
        ("[1, 2]", "model.safetensors.index.json: has no readable weight_map"),
        (
            json.dumps({"weight_map": dict.fromkeys([*tensors(copy), "lm_head.weight"], "model.safetensors")}),
            "model.safetensors: tensor 'lm_head.weight' is not in it",
        ),
        (
            json.dumps({"weight_map": dict.fromkeys(tensors(copy), "model-00001-of-00002.safetensors")}),
            "model-00001-of-00002.safetensors: not found",
        ),
    ):
        index.write_text(content)
        assert_refused(capsys, tmp_path, "hf-to-megatron", copy, message)


def test_files_beside_the_weights(copy, tmp_path):
    (copy / "latest").write_text("global_step500")  # of DeepSpeed: no Megatron checkpoint
    (copy / "pytorch_model.bin.index.json").write_text("{}")
    megatron = to_megatron(copy, tmp_path / "megatron")
    assert (megatron / "tokenizer.model").is_file()
    assert not (megatron / "pytorch_model.bin.index.json").exists()


def test_a_megatron_checkpoint_of_another_model(hf, tmp_path, capsys):
    llama = to_megatron(hf("llama"), tmp_path / "llama")
    for config, message in ((hf("qwen3"), "q_layernorm.weight' is missing"), (hf("llama", num_hidden_layers=8), "8, ")):
        assert_refused(capsys, tmp_path, "megatron-to-hf", llama, message, "--config", config)
    qwen = to_megatron(hf("qwen3"), tmp_path / "qwen")
    assert_refused(capsys, tmp_path, "reshard", qwen, "k_layernorm.weight' is not in this", "--config", hf("llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tp", "3"), "--tp 3 does not divide the 8 attention heads of this model; use 1, 2, 4 or 8"),
        (("--tp", "16"), "--tp 16 does not divide the 8 attention heads"),
        (("--pp", "8"), "--pp 8 exceeds the 7 layers"),
        (("--pp", "2", "--vpp", "4"), "--vpp 4: 7 layers do not fill"),
        (("--vpp", "2"), "--pp must exceed 1"),
        (("--ep", "2"), "--ep 2 does not divide the 0 experts"),
        (("--tp", "0"), "--tp 0 must be at least 1"),
        (("--processes", "0"), "--processes 0 must be at least 1"),
        (("--iteration", "new"), "--iteration 'new' must be a number"),
    ],
)
def test_layouts_that_cannot_be(hf, tmp_path, capsys, options, message):
    assert_refused(capsys, tmp_path, "hf-to-megatron", hf("qwen3", tied=True), message, *options)


def test_folders_that_cannot_be(hf, tmp_path, capsys, monkeypatch):
    source = hf("qwen3", tied=True)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").write_text("mine")
    assert_refused(capsys, tmp_path, "hf-to-megatron", source, "target: not empty")
    assert (tmp_path / "target" / "kept").read_text() == "mine"
    shutil.rmtree(tmp_path / "target")
    (tmp_path / "target").write_text("mine")
    assert_refused(capsys, tmp_path, "hf-to-megatron", source, "target: is a file")
    (tmp_path / "target").unlink()
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "hf-to-megatron", source, ".")[0] == 2 and not list(tmp_path.iterdir())
    assert_refused(capsys, tmp_path, "megatron-to-hf", source, "a Hugging Face folder use hf-to-megatron")
    assert_refused(capsys, tmp_path, "hf-to-megatron", tmp_path / "nothing", "nothing: not found")
    bare = to_megatron(source, tmp_path / "bare") / "release"
    assert_refused(capsys, tmp_path, "megatron-to-hf", bare, "no config.json there")
    assert_refused(capsys, tmp_path, "hf-to-megatron", bare, "use reshard or megatron-to-hf")
    for size in ("big", "5"):
        said = f"--shard-size '{size}' is not a size; write for example 5GB or 500MB"
        assert_refused(capsys, tmp_path, "megatron-to-hf", bare, said, "--config", source, f"--shard-size={size}")


GELU = {"hidden_act": "gelu"}
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}


@pytest.mark.parametrize(
    ("change", "message"), [(GELU, 'hidden_act="gelu"'), (DYNAMIC, "rope_scaling.rope_type='dynamic'")]
)
def test_every_command_that_reads_a_model_refuses_what_is_not_covered(
    hf, tmp_path, monkeypatch, capsys, change, message
):
    source = hf("qwen3")
    right = to_megatron(source, tmp_path / "right")
    copy, megatron = (Path(shutil.copytree(folder, tmp_path / f"wrong{n}")) for n, folder in enumerate((source, right)))
    for folder in (copy, megatron):
        edit_config(folder, **change)
    before = sorted(tmp_path.iterdir())
    commands = [
        ("hf-to-megatron", copy, tmp_path / "new"),
        ("hf-to-megatron", copy, tmp_path / "new", "--dry-run"),
        ("megatron-to-hf", megatron, tmp_path / "new"),
        ("megatron-to-hf", right, tmp_path / "new", "--config", copy),
        ("reshard", megatron, tmp_path / "new", "--tp=2"),
        ("verify", source, megatron),
        ("verify", source, megatron, "--logits"),
    ]
    for command in commands:
        code, out, error = run(capsys, *command)
        assert (code, out, error.count("\n")) == (2, "", 1), (command, error)
        assert (
            error.startswith("rlad: ") and f"{message} in " in error and "of this qwen3 model is not covered" in error
        )
    monkeypatch.chdir(Path(__file__).parents[2])
    student, teacher = f"student.path={copy}", f"teacher.path={copy}"
    runs = f"runs_dir={tmp_path / 'runs'}"
    for arguments in (
        ["plan", "kk_tiny_cpu", student],
        ["plan", "kk_tiny_cpu", teacher],
        ["train", "kk_tiny_cpu", student, runs],
        ["train", "kk_tiny_cpu", teacher, runs],
        ["sft", "kk_tiny_student_sft", student, runs],
        ["evaluate", "kk_tiny_cpu", student, runs],
        ["evaluate", "kk_tiny_cpu", teacher, "teacher.precision=bf16", runs, "--teacher-gap"],
    ):
        assert main(arguments) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1 and f"{message} in {copy / 'config.json'}" in error, (
            arguments,
            error,
        )
    assert sorted(tmp_path.iterdir()) == before


def named(folder):
    return (
        f"model {folder}: config.json has fields this version does not know: foo=1; "
        "`rlad convert` from or to Hugging Face compares logits to be sure\n"
    )


def test_the_first_command_that_reads_a_model_names_unknown_fields_once(hf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[2])

    def copy_of(folder, name):
        copy = Path(shutil.copytree(folder, tmp_path / name))
        edit_config(copy, foo=1)
        return copy

    copy = copy_of("recipes/assets/kk_tiny_student", "plan")
    student, teacher = f"student.path={copy}", f"teacher.path={copy}"
    for models in ([student], [teacher], [student, teacher]):
        print_unknown_fields.cache_clear()  # as in a new process
        assert main(["plan", "kk_tiny_cpu", *models]) == 0
        assert capsys.readouterr().err == named(copy)
    copy = copy_of(hf("qwen3"), "copy")  # its tokenizer is none, so that nothing starts
    for arguments in (["train", "kk_tiny_cpu"], ["sft", "kk_tiny_student_sft"], ["evaluate", "kk_tiny_cpu"]):
        print_unknown_fields.cache_clear()
        assert main([*arguments, f"student.path={copy}", f"runs_dir={tmp_path / 'runs'}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(named(copy) + "rlad: ") and error.count("\n") == 2
    for arguments in (["hf-to-megatron", copy, tmp_path / "new", "--dry-run"], ["verify", copy, copy, "--sample"]):
        print_unknown_fields.cache_clear()
        code, _, error = run(capsys, *arguments)
        assert (code, error) == (0, named(copy))


def test_a_comparison_of_logits_that_cannot_be_is_refused_before_anything_is_written(hf, tmp_path, monkeypatch, capsys):
    source = hf("llama", foo=1)
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(targets.MegatronTarget, "create", None)
        patch.delitem(transformers.CONFIG_MAPPING._mapping, "llama")
        code, _, error = run(capsys, "hf-to-megatron", source, target)
        assert code == 2 and f"{transformers.__version__} has no such model; install a newer one, or" in error
    with monkeypatch.context() as patch:
        patch.setattr(logits.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
        code, _, error = run(capsys, "hf-to-megatron", source, target)
        assert code == 2 and "needs about 1.6 MB of memory, and 1.0 MB are free; use a larger machine, or" in error
        assert not list(tmp_path.iterdir())
        code, out, _ = run(capsys, "hf-to-megatron", source, target, "--no-verify")  # as the message says
        assert code == 0 and "verified:" not in out and "logits of" not in out
    with monkeypatch.context() as patch:
        patch.setattr(logits, "check_loadable", Mock(side_effect=CheckpointError("newer")))
        patch.setattr(targets.HfTarget, "create", None)
        assert run(capsys, "megatron-to-hf", target, tmp_path / "back")[::2] == (2, named(target) + "rlad: newer\n")
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    edit_config(copy, attention_dropout="much")
    with pytest.raises(
        CheckpointError, match=rf"^{copy}: transformers {transformers.__version__} cannot load it"
    ) as caught:
        logits.transformers_logits(copy, torch.tensor([1]))
    assert "attention_dropout" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("verb", "processes"), [("hf-to-megatron", 1), ("hf-to-megatron", 2), ("megatron-to-hf", 1)])
def test_no_space_left(hf, tmp_path, capsys, verb, processes):
    """The file system refuses more than 200 KB in a file (as a full disk would, at some other point)."""
    source = hf("qwen3", tied=True)
    if verb == "megatron-to-hf":
        source = to_megatron(source, tmp_path / "megatron")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 * 1024, before[1]))
    try:
        assert_refused(capsys, tmp_path, verb, source, str(tmp_path / "target.tmp"), "--processes", processes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_too_small_is_seen_before_writing(tmp_path):
    conversion = Conversion("source", str(tmp_path / "new" / "target"), "source", None)
    check_space(conversion, 10**6)
    with pytest.raises(CheckpointError, match="target: needs 1(,000){6} bytes, but .* free; free some space"):
        check_space(conversion, 10**18)


def test_a_process_that_dies_is_named(tmp_path):
    class Dies:
        conversion = Conversion("source", "target", "source", None, processes=2)

        def write(self, process, on_bytes):
            if process == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    with pytest.raises(CheckpointError, match="process 1 ended with exit code -9"), start(Dies()) as finish:
        finish(lambda count: None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_conversion_that_is_stopped_leaves_nothing_under_the_name(hf, tmp_path, monkeypatch, number):
    source = hf("qwen3", tied=True)

    def stopped():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
        monkeypatch.setattr(targets, "write_rest", lambda *_: os.kill(os.getpid(), number))
        sys.exit(main(["convert", "hf-to-megatron", source, str(tmp_path / "target")]))

    assert in_a_process(stopped) == {signal.SIGKILL: -9, signal.SIGINT: 130}[number]
    if number == signal.SIGINT:
        assert not list(tmp_path.iterdir())
        return
    assert [path.name for path in tmp_path.iterdir()] == ["target.tmp"]
    (tmp_path / "target.tmp" / "release" / "__9_0.distcp").write_bytes(b"left over")
    to_megatron(source, tmp_path / "target")  # the next one starts clean
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert not list(tmp_path.rglob("__9_0.distcp"))


def test_the_script_converts_and_needs_no_installation(hf, tmp_path, monkeypatch):
    script = str(Path(__file__).parents[2] / "tools" / "convert_checkpoint.py")
    monkeypatch.setattr(sys, "argv", [script, "hf-to-megatron", hf("llama"), str(tmp_path / "target"), "--pp=2"])
    assert in_a_process(lambda: runpy.run_path(script, run_name="__main__")) == 0
    verify_folders(QUIET, hf("llama"), str(tmp_path / "target"), read_model_spec(hf("llama")), sample=False)
    # Without `site`, .pth files are not read, so no editable install is seen.
    result = subprocess.run(
        [sys.executable, "-S", script, "--help"],
        env={"PYTHONPATH": sysconfig.get_path("purelib")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and "hf-to-megatron" in result.stdout, result.stderr


def test_dry_run_and_inspect_print_tables(hf, tmp_path, capsys, monkeypatch):
    source = hf("qwen3_moe")
    code, out, _ = run(capsys, "hf-to-megatron", source, tmp_path / "target", "--tp=2", "--ep=2", "--dry-run")
    assert code == 0 and "TP 2 PP 1 VPP 1 EP 2" in out and "memory of each process" in out
    assert not list(tmp_path.iterdir())
    assert "at most 150 MB" in out and "0.2 MB" in out  # the embedding, 1003 x 48 in float32
    _, out, _ = run(capsys, "hf-to-megatron", source, tmp_path / "target", "--dtype=bfloat16", "--dry-run")
    assert "0.2 MB" in out  # it is read in float32 all the same
    megatron = to_megatron(source, tmp_path / "megatron", (2, 1, 1, 2))
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "inspect", megatron)
    assert code == 0 and "TP 2 PP 1 VPP 1 EP 2" in out and "7 x 4 x 48 x 48" in out
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in out  # names stay whole
    code, out, _ = run(capsys, "inspect", source)
    assert code == 0 and "Hugging Face" in out and "parameters" in out
    for arguments in (("inspect", "nothing"), ("verify", source, "nothing"), ("verify", "nothing", source)):
        code, _, error = run(capsys, *arguments)
        assert code == 2 and error == "rlad: nothing: not found; give a folder\n"
    (tmp_path / "empty").mkdir()
    assert run(capsys, "inspect", tmp_path / "empty")[2].endswith("; give a Hugging Face or a Megatron checkpoint\n")


@pytest.mark.parametrize(
    "arguments", [("hf-to-megatron", "nothing", "new"), ("verify", ".", "nothing"), ("inspect", "nothing")]
)
def test_a_missing_folder_is_named_before_torch_is_imported(arguments):
    code = f"""
import sys
from rlad_megatron.cli import main
assert main(["convert", *{arguments}]) == 2
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "rlad: nothing: not found; give a folder\n")
