"""Megatron-Core itself loads what the conversion writes, and the conversion reads what Megatron-Core saves.

Of Transformer Engine's layers where it is installed, of Megatron's own where it is not.
"""

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import HAS_GATED_DELTA_NETS, make_model
from transformer_engine_layers import installed, made_without_gpu

from rlad_megatron.cli import main
from rlad_megatron.convert import logits
from rlad_megatron.convert.layout import CheckpointLayout
from rlad_megatron.convert.run import convert
from rlad_megatron.convert.targets import Conversion
from rlad_megatron.models.load import HfCheckpoint
from rlad_megatron.models.megatron_folder import find_iteration
from rlad_megatron.models.megatron_tensors import MODEL_PREFIXES
from rlad_megatron.models.registry import FAMILIES, MISTRAL
from rlad_megatron.models.torch_dist import read_metadata

pytestmark = pytest.mark.multiproc

WORLD = 4
LAYOUT_ARGS = [  # of Megatron-LM
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
]
COMMON = {"common_state/shard_0_1"}  # Megatron-Core 0.19: what older versions and we keep in common.pt
PER_LAYER = "-per-layer"  # saved with a key for each layer
# name: (family, changes to its configuration, layout that Megatron runs in, layout that the conversion writes)
CASES = {
    "qwen3-tied-tp2-pp2": ("qwen3", {"tie_word_embeddings": True}, (2, 2, 1, 1, 2), (4, 3, 1, 1)),
    "qwen2-bias-pp4-uneven": ("qwen2", {"tie_word_embeddings": False}, (1, 4, 1, 1, 1), (2, 1, 1, 1)),
    "llama-tp4": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 2}, (4, 1, 1, 1, 4), (1, 2, 1, 1)),
    "llama-pp2-vpp2-uneven": ("llama", {}, (2, 2, 2, 1, 2), (1, 1, 1, 1)),
    "moe-tp2-ep2": ("qwen3_moe", {}, (2, 1, 1, 2, 2), (1, 3, 1, 4)),
    "moe-tp2-ep2-etp1": ("qwen3_moe", {}, (2, 1, 1, 2, 1), (4, 1, 1, 1)),
    "moe-ep2-etp2": ("qwen3_moe", {}, (1, 1, 1, 2, 2), (1, 1, 1, 2)),
    "hybrid-tp2-pp2": ("qwen3_5_text", {"tie_word_embeddings": True}, (2, 2, 1, 1, 2), (4, 3, 1, 1)),
    "hybrid-moe-tp2-ep2": ("qwen3_5_moe_text", {}, (2, 1, 1, 2, 2), (1, 3, 1, 4)),
    "moe-pp2-ep2-grouped": ("qwen3_moe", {"tie_word_embeddings": True}, (1, 2, 1, 2, 1), (2, 1, 1, 1)),
}
CASES = {name: case for name, case in CASES.items() if HAS_GATED_DELTA_NETS or "hybrid" not in name}
GROUPED = "grouped"  # in a case's name: experts in Megatron's GroupedMLP instead of its SequentialMLP
VIRTUAL_LAYERS = (
    "Ett|tt|tt|tL"  # what the chunks hold where PP 2 and VPP 2 cut 7 layers (t), embedding (E) and head (L)
)


def like_transformer_engine(model, num_experts):
    """Give the norms the extra state that Transformer Engine's have and ours have not.

    It is an empty tensor there, and None is taken for it (transformer_engine/pytorch/ops/op.py). Norms that Transformer
    Engine fuses into the next linear layer are not separate modules.
    """

    from rlad_megatron.models.norm import RmsNorm

    class Norm(RmsNorm):
        def get_extra_state(self):
            return torch.empty(0, dtype=torch.uint8)

        def set_extra_state(self, state):
            assert state is None or state.numel() == 0

    fused = ("input_layernorm",) if num_experts else ("input_layernorm", "pre_mlp_layernorm")
    for name, module in model.named_modules():
        if isinstance(module, RmsNorm) and not name.endswith(fused):
            module.__class__ = Norm


def as_megatron_has_it(attention):
    """Give a gated delta net Megatron's output norm, which is zero-centred if the others are."""
    from rlad_megatron.models.norm import RmsNorm

    if hasattr(attention.submodules, "out_norm"):
        from megatron.core.ssm.gated_delta_net import GatedDeltaNet

        attention.module, attention.submodules.out_norm = GatedDeltaNet, RmsNorm


def megatron_models(model, layout, *, grouped):
    """The model chunks of this rank, with Megatron's initial weights."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.moe import experts
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    from rlad_megatron.config import TRANSFORMER_ENGINE, LayoutConfig, ModelConfig
    from rlad_megatron.models.build import decoder_spec, transformer_config
    from rlad_megatron.models.shard_plan import deal, layers_per_stage
    from rlad_megatron.parallel.loss_memory import padded_vocab_size

    tp, pp, vpp, ep, etp = layout
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    torch.manual_seed(0)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(0)
    config = transformer_config(model, ModelConfig("", LayoutConfig(1, pp), "fp32"))
    config.tensor_model_parallel_size = tp  # the trainer refuses more ranks than key-value heads; Megatron does not
    config.expert_model_parallel_size = ep
    config.expert_tensor_parallel_size = etp
    config.transformer_impl = TRANSFORMER_ENGINE if installed() else "local"
    if vpp > 1:
        config.virtual_pipeline_model_parallel_size = vpp
        config.num_layers_in_first_pipeline_stage = config.num_layers_in_last_pipeline_stage = None
        config.pipeline_model_parallel_layout = PipelineParallelLayerLayout.from_str(VIRTUAL_LAYERS, pp)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    stage = deal(layers_per_stage(model.num_layers, pp * vpp), pp)[pp_rank]
    specs = [decoder_spec(model, config, layers) for layers in stage]
    for layer in (layer for spec in specs for layer in spec.layer_specs):
        as_megatron_has_it(layer.submodules.self_attention)
        if grouped and hasattr(experts, "GroupedMLP"):  # later Megatron-Core has it for Transformer Engine alone
            experts.gg.assert_grouped_gemm_is_available = lambda: None  # its forward needs that, its weights do not
            layer.submodules.mlp.submodules.experts.module = experts.GroupedMLP
            layer.submodules.mlp.submodules.experts.submodules = None
    with made_without_gpu():
        chunks = [
            GPTModel(
                config=config,
                transformer_layer_spec=specs[chunk],
                vocab_size=padded_vocab_size(model.vocab_size, tp),
                max_sequence_length=256,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
                position_embedding_type="rope",
                share_embeddings_and_output_weights=model.tied,
                vp_stage=chunk if vpp > 1 else None,
            )
            for chunk in range(vpp)
        ]
    if not installed():
        for chunk in chunks:
            like_transformer_engine(chunk, config.num_moe_experts)
    return chunks


def load_and_save(rank, world_size, cases):
    """Load each checkpoint with Megatron-Core in another layout than it was written for, and save it from there."""
    from rlad_megatron import platform

    platform.setup()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from rlad_megatron.models.config_json import read_model_spec

    for hf, layout, source, target in cases:
        chunks = megatron_models(read_model_spec(hf), layout, grouped=GROUPED in target)
        state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
        loaded = dist_checkpointing.load(state, str(find_iteration(source)[0]))
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
        for folder, metadata in ((target, {}), (target + PER_LAYER, {"non_homogeneous_layers": True})):
            if rank == 0:
                Path(folder).mkdir()
            torch.distributed.barrier()
            saved = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
            saved["args"] = Namespace(**dict(zip(LAYOUT_ARGS, layout, strict=True)))
            # What a training run has as well as its model.
            moment = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
            saved["optimizer"] = {"moment": ShardedTensor.from_rank_offsets(moment, torch.ones(48), replica_id=rank)}
            saved["rng_state"] = ShardedObject("rng_state", [0], (1,), (0,), replica_id=rank)
            saved["iteration"] = 7
            dist_checkpointing.save(saved, folder)
            torch.distributed.barrier()


def test_verify_compares_logits(tmp_path, capsys, monkeypatch):
    """The command line, with a Megatron model over two processes."""
    hf, megatron = make_model(tmp_path / "hf", "llama"), str(tmp_path / "megatron")
    convert(Conversion(hf, megatron, hf, CheckpointLayout(4, 2)), Console(quiet=True), verify=False)
    arguments = ["convert", "verify", hf, megatron, "--sample", "--logits", "--tp=2", "--tokens=5,1002,17,3"]
    computed = []
    compute = logits.megatron_logits
    monkeypatch.setattr(logits, "megatron_logits", lambda *a, **k: computed.append(compute(*a, **k)) or computed[0])
    assert main(arguments) == 0
    assert "logits of 4 tokens at TP 2" in capsys.readouterr().out
    monkeypatch.setattr(logits, "megatron_logits", lambda *_, **__: computed[0])  # the processes take seconds
    other = make_model(tmp_path / "other", "llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert main([*arguments[:2], other, *arguments[3:]]) == 2  # the same tensors, another model
    assert "logits differ by" in capsys.readouterr().err


# --- fields of config.json that are on no list ---


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of `rlad convert ...`."""
    capsys.readouterr()
    code = main(["convert", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_a_model_with_unknown_fields_ends_with_a_comparison_of_logits(tmp_path, capsys):
    hf, megatron, back = make_model(tmp_path / "hf", "qwen3_moe", foo=1), tmp_path / "megatron", tmp_path / "back"
    compared = "logits of 32 tokens at TP 1: largest difference"
    for arguments in (("hf-to-megatron", hf, megatron, "--tp=2", "--ep=2"), ("megatron-to-hf", megatron, back)):
        code, out, error = run(capsys, *arguments)
        assert code == 0 and compared in out and "verified" not in out
        assert (
            error.count("\n") == 1
            and error.startswith(f"model {arguments[1]}: config.json has fields")
            and "foo=1" in error
        )
    code, out, _ = run(capsys, "reshard", megatron, tmp_path / "resharded")  # transformers can run neither side
    assert code == 0 and "verified a sample: " in out and "logits of" not in out
    code, out, _ = run(capsys, "hf-to-megatron", hf, tmp_path / "rounded", "--dtype=bfloat16")
    assert code == 0 and compared in out  # rounding is no reason to refuse
    plain = make_model(tmp_path / "plain", "qwen3_moe")
    code, out, error = run(capsys, "hf-to-megatron", plain, tmp_path / "other")
    assert code == 0 and "verified a sample: " in out and "logits of" not in out and error == ""


def assert_a_number(out, error):
    difference = float(re.search(r"largest difference (\S+)", out)[1])
    assert difference > 0.01 and error.count("rlad: ") == 1
    assert f"logits differ by {difference:.3g}, more than the bound of 0.0001; an unknown field of config.json" in error


def test_an_unknown_field_that_changes_the_arithmetic_shows_as_a_number(tmp_path, capsys, monkeypatch):
    """A field of transformers' arithmetic, with the lists of a version that does not know it."""
    hf = make_model(tmp_path / "hf", "mistral", sliding_window=4)
    lists = {"only": {**MISTRAL.only}, "defaults": {**MISTRAL.defaults}}
    for fields in lists.values():
        del fields["sliding_window"]
    monkeypatch.setitem(FAMILIES, "mistral", replace(MISTRAL, **lists))
    code, out, error = run(capsys, "hf-to-megatron", hf, tmp_path / "megatron")
    assert code == 2 and "does not know: sliding_window=4;" in error
    assert_a_number(out, error)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_comparison_of_logits_finds_weights_that_are_written_wrong(tmp_path, capsys, monkeypatch):
    hf = make_model(tmp_path / "hf", "llama", foo=1)
    read = HfCheckpoint.read
    wrong = "model.layers.3.mlp.down_proj.weight"
    monkeypatch.setattr(
        HfCheckpoint, "read", lambda self, name, box: read(self, name, box) * (1 + 0.1 * (name == wrong))
    )
    code, out, error = run(capsys, "hf-to-megatron", hf, tmp_path / "megatron")
    assert code == 2
    assert_a_number(out, error)


def chunks_of(folder):
    """{key: (shape, dtype, chunks)} of the model's tensors in a checkpoint, and the keys of what is no tensor."""
    everything = read_metadata(Path(folder)).state_dict_metadata
    metadata = {key: value for key, value in everything.items() if key.startswith(MODEL_PREFIXES)}
    tensors = {
        key: (tuple(value.size), value.properties.dtype, {(tuple(c.offsets), tuple(c.sizes)) for c in value.chunks})
        for key, value in metadata.items()
        if hasattr(value, "chunks")
    }
    return tensors, set(metadata) - set(tensors)


def test_megatron_reads_what_we_write_and_we_read_what_it_saves(tmp_path, capsys):
    quiet = Console(quiet=True)
    cases = []
    for name, (family, changes, runs_in, written_for) in CASES.items():
        hf = make_model(tmp_path / name, family, **changes)
        folders = [str(tmp_path / f"{name}-{suffix}") for suffix in ("ours", "same", "saved", "back")]
        for folder, layout in zip(folders, (written_for, runs_in), strict=False):
            convert(Conversion(hf, folder, hf, CheckpointLayout(*layout[:4])), quiet, verify=False)
        cases.append((hf, runs_in, folders[0], folders[2]))
    run_ranks(load_and_save, WORLD, cases)
    for name in CASES:
        hf, same, saved, back = (tmp_path / f"{name}{suffix}" for suffix in ("", "-same", "-saved", "-back"))
        ours, our_objects = chunks_of(find_iteration(same)[0])
        theirs, their_objects = chunks_of(saved)
        tensor, *_, of_expert = CASES[name][2]
        # It writes the experts of a rank in one chunk, or we cut experts like the rest.
        if GROUPED in name or tensor != of_expert:
            ours, theirs = ({key: value[:2] for key, value in side.items()} for side in (ours, theirs))
        assert ours == theirs, name  # the same tensors, cut in the same places
        attention = {key for key in our_objects if ".core_attention." in key}  # Megatron saves none of attention
        assert our_objects - their_objects == attention and their_objects - COMMON < our_objects, name
        assert main(["convert", "inspect", str(saved)]) == 0
        assert "TP {} PP {} VPP {} EP {},".format(*CASES[name][2]) in capsys.readouterr().out
        for suffix in ("", PER_LAYER):
            convert(Conversion(f"{saved}{suffix}", f"{back}{suffix}", str(hf), None), quiet, verify=True)
            expected, result = load_file(hf / "model.safetensors"), load_file(f"{back}{suffix}/model.safetensors")
            assert expected.keys() == result.keys()
            for key, tensor in expected.items():
                assert torch.equal(result[key], tensor), (name, suffix, key)
