"""Operations of a pass, the metrics made of them, and the traces of a step."""

import gzip
import json

import pytest
import torch
from tiny_models import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rlad_megatron import perf
from rlad_megatron.config import ProfileConfig
from rlad_megatron.config.recipe import load_run
from rlad_megatron.data.synthetic import synthetic_samples
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.observe.profile import profiled
from rlad_megatron.perf import Performance, memory_metrics, slowest_ranks
from rlad_megatron.plan.cost import UPDATE_PASSES, forward_flops
from rlad_megatron.plan.devices import bf16_flops


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_operations_are_those_that_torch_counts(family, tmp_path):
    length = 9
    folder = make_model(tmp_path, family, num_hidden_layers=1)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the counter knows no grouped products
    model = AutoModelForCausalLM.from_pretrained(folder, **eager)
    tokens = torch.randint(0, 1003, (1, length))
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    spec = read_model_spec(folder)
    masked = spec.num_layers * 2 * length**2 * spec.size("query")  # the half that eager attention computes in vain
    ours = forward_flops(spec, [length], length)
    assert forward.get_total_flops() == ours + masked
    assert forward.get_total_flops() + backward.get_total_flops() == UPDATE_PASSES * (ours + masked)
    # Sequences do not attend to each other, and the head is computed where there is loss.
    both = forward_flops(spec, [length, length], length)
    assert both == 2 * ours - 2 * length * spec.hidden_size * spec.vocab_size


def test_mfu_and_tokens_by_hand(tmp_path):
    spec = read_model_spec("recipes/assets/kk_tiny_student")
    samples = synthetic_samples([(3, 5), (4, 6)], spec.vocab_size)
    flops = forward_flops(spec, [8, 10], 11)
    config = load_run("kk_tiny_cpu", ["teacher.ranks_per_node=1"])
    done = Performance(config, spec, spec, rate=100.0)
    done.trained(samples)
    done.scored(samples)
    times = {"time/step": 9.0, "time/update": 4.0}
    assert done.pop(times, teacher_s=2.0) == {
        "perf/tokens_per_s": 2.0,
        "perf/tokens_per_gpu_s": 1.0,  # two ranks on CPUs
        "perf/mfu": pytest.approx(3 * flops / 4 / 200),
        "perf/mfu_teacher": pytest.approx(flops / 2 / 100),
    }
    assert done.pop(times) == {"perf/tokens_per_s": 0.0, "perf/tokens_per_gpu_s": 0.0}


def test_gpus_count_with_the_whole_nodes_that_a_run_takes():
    config = load_run("math_r1_distill_7b_from_32b", [])
    done = Performance(config, None, None, rate=1.0)
    done.tokens = 6400
    assert done.pop({"time/step": 1.0})["perf/tokens_per_gpu_s"] == 100.0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A10", None),
        ("", None),
    ],
)
def test_peaks_by_name(name, tflops):
    assert bf16_flops(name) == (tflops and tflops * 1e12)


def test_the_slowest_rank(monkeypatch):
    monkeypatch.setattr(perf.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(perf, "_of_all_ranks", lambda values: [[1.0, 4.0, 1.0], [0.0, 0.0, 0.0]])
    assert slowest_ranks({"update": 1.0, "teacher": 0.0}) == {"slowest/update": 1, "slowest/update_over_mean": 2.0}


def test_memory_by_part(monkeypatch):
    assert set(memory_metrics({"weights": 10**9})) == {"memory/weights_gb", "memory/peak_gb"}
    monkeypatch.setattr(perf.platform, "peak_memory_gb", lambda: 5.0)
    monkeypatch.setattr(perf.platform, "held_memory_gb", lambda: 3.5)
    found = memory_metrics({"weights": 10**9})
    assert found == {"memory/weights_gb": 1.0, "memory/peak_gb": 5.0, "memory/activations_gb": 1.5}


def test_only_chosen_steps_and_ranks_are_profiled(tmp_path):
    config, said = ProfileConfig(steps=(2,), ranks=(1,)), []
    for step, rank in ((1, 1), (2, 0), (2, 1)):
        with profiled(config, tmp_path, step, rank, False, said.append):
            torch.ones(3, 3) @ torch.ones(3, 3)
    (file,) = (tmp_path / "profile").iterdir()
    assert said == [f"profile of step 2, rank 1: {file}"] and file.name == "step_00000002_rank_1.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert "aten::mm" in {event["name"] for event in events}
