"""Whole runs through the command line, on the demo's models: artefacts, the exported student, schedules."""

import json
import subprocess
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from ports import free_port
from safetensors.torch import load_file
from small_run import RLAD, SMALL, external_server
from transformers import AutoModelForCausalLM

from rlad_megatron.cli import main

pytestmark = pytest.mark.e2e

RUN = [*SMALL, "data.eval_size=16", "objective.dynamic_sampling=16", "objective.reference_kl=0.1"]
# One group at a time, and one fills a wave.
STREAMING = [
    "rollout.schedule=streaming",
    "teacher.ranks_per_node=1",
    "train.microbatch_tokens=256",
    "rollout.max_concurrency=4",
]


def rlad(*arguments, timeout=600):
    process = subprocess.run([*RLAD, *arguments], capture_output=True, text=True, timeout=timeout)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def metrics(folder):
    return {line["step"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def every_rank_has_each_step_once(folder):
    events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    steps = Counter((rows[event["tid"]], event["args"]["step"]) for event in events if event["name"] == "step")
    return steps == dict.fromkeys(product(("trainer rank 0", "trainer rank 1"), (1, 2, 3)), 1)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    out = rlad("train", *RUN, f"runs_dir={runs}", "name=whole", f"rollout.port={free_port()}")
    return runs / "whole", out


def test_a_run_leaves_what_it_promises(whole_run):
    folder, out = whole_run
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints/latest", "rollouts", "hf", "report.html"):
        assert (folder / name).exists(), name
    assert every_rank_has_each_step_once(folder)
    assert "held-out" in out and "report.html" in out
    lines = metrics(folder)
    assert sorted(lines) == [0, 1, 2, 3]
    for key in (
        "reward/mean",
        "reward/solved",
        "loss/policy",
        "ratio/clip_fraction",
        "trrd/teacher_gap_mean",
        "trrd/clamp_fraction",
        "mismatch/abs_mean",
        "mismatch/abs_max",
        "sync/probe_abs_max",
        "sync/seconds",
        "sync/pause_seconds",
        "sync/bytes",
        "sync/gb_per_s",
        "tokens/rollout",
        "tokens/train",
        "tokens/padding_share",
        "time/step",
        "time/rollout",
        "time/reward",
        "time/teacher",
        "time/update",
        "time/weight_sync",
        "grad_norm",
        "lr",
        "perf/tokens_per_s",
        "perf/tokens_per_gpu_s",
        "perf/mfu",
        "perf/mfu_teacher",
        "slowest/update",
        "memory/peak_gb",
        "memory/weights_gb",
        "memory/gradients_gb",
        "memory/optimizer_gb",
        "memory/teacher_gb",
        "slowest/teacher",
        "slowest/teacher_over_mean",
    ):
        assert isinstance(lines[2][key], float | int), key
    assert lines[3]["mismatch/abs_max"] < 1e-3 and lines[3]["sync/probe_abs_max"] < 1e-3
    assert "eval/accuracy" in lines[0] and "eval/accuracy" in lines[3]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "latest",
        "step_00000002",
        "step_00000003",
    ]
    rollout = json.loads((folder / "rollouts" / "step_00000002.jsonl").read_text().splitlines()[0])
    assert {version for version, _ in rollout["weight_versions"]} == {1} and "<answer>" in rollout["response"]
    kept = [json.loads(line) for path in (folder / "rollouts").iterdir() for line in path.open()]
    trained = [rollout for rollout in kept if "student_log_probs" in rollout]
    assert trained and all(
        len(rollout[name]) == len(rollout["response_tokens"])
        for rollout in trained
        for name in ("response_pieces", "teacher_log_probs", "old_log_probs", "ratio", "clipped", "clamped", "mismatch")
    )
    assert max(abs(value) for rollout in trained for value in rollout["mismatch"]) < 1e-3
    report = (folder / "report.html").read_text()
    assert "default-src 'none'" in report and all(json.dumps(it["id"])[1:-1] in report for it in kept)


def test_the_teachers_precision_is_measured_on_the_rollouts_of_a_run(whole_run):
    folder, _ = whole_run
    out = rlad("evaluate", "--teacher-gap", str(folder / "config.yaml"), "teacher.precision=bf16")
    assert "teacher in bf16 against fp32" in out and "clip decisions flipped" in out
    gap = json.loads((folder / "teacher_gap.json").read_text())
    rollouts = [json.loads(line) for file in (folder / "rollouts").iterdir() for line in file.read_text().splitlines()]
    assert (gap["rollouts"], gap["tokens"]) == (24, sum(len(rollout["response_tokens"]) for rollout in rollouts))
    assert 1e-5 < gap["abs_mean"] < gap["abs_p99"] < gap["abs_max"] < 2.0
    assert 0 < gap["clamped"] < 0.5 and gap["clamp_flipped"] < 0.1 and gap["clip_flipped"] < 0.1


def test_the_weights_moved_and_the_export_loads(whole_run):
    folder, _ = whole_run
    before = load_file(Path("recipes/assets/kk_tiny_student/model.safetensors"))
    after = load_file(folder / "hf" / "model.safetensors")
    assert set(before) == set(after)
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    assert torch.equal(model.model.norm.weight, after["model.norm.weight"])


def test_the_checkpoint_of_a_run_converts_to_its_export(whole_run, tmp_path):
    folder, _ = whole_run
    words = ["convert", "megatron-to-hf", folder / "checkpoints", tmp_path / "hf", "--config", folder / "hf"]
    assert main([str(word) for word in words]) == 0
    converted, export = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", folder / "hf"))
    assert converted.keys() == export.keys()
    assert all(torch.equal(converted[name].to(export[name].dtype), export[name]) for name in export)


@pytest.fixture(scope="module")
def server(whole_run, tmp_path_factory):
    """Serves the exported student."""
    with external_server(tmp_path_factory.mktemp("server"), whole_run[0] / "hf") as server:
        yield server


def test_the_export_scores_in_vllm_as_the_run_did(whole_run, server):
    """Before the run below, which pushes other weights to the server."""
    folder, _ = whole_run
    out = rlad("evaluate", *RUN, f"student.path={folder / 'hf'}", *server)
    assert f"{metrics(folder)[3]['eval/accuracy']:.3f}" in out


def test_a_streaming_step_is_a_phased_one_with_a_dedicated_teacher_too(whole_run, server, tmp_path):
    """Servers work while the ranks train, and the step is the same."""
    short = ["train.steps=2", "checkpoint.export_hf=false"]
    rlad("train", *RUN, *STREAMING, *short, *server, f"runs_dir={tmp_path}", "name=streaming")
    phased, streaming = metrics(whole_run[0]), metrics(tmp_path / "streaming")
    for key in ("reward/mean", "loss/policy", "grad_norm", "trrd/teacher_gap_mean", "tokens/train", "tokens/rollout"):
        assert streaming[1][key] == pytest.approx(phased[1][key], rel=1e-4), key
    assert streaming[1]["rollout/replaced_groups"] == phased[1]["rollout/replaced_groups"] > 0
    for line in (phased, streaming):
        assert line[1]["reference/kl_mean"] < 1e-9 < line[2]["reference/kl_mean"]
        assert line[2]["entropy/mean"] > 0 and "time/reference" in line[2]
    assert streaming[2]["rollout/version_lag_max"] == 0
    spans = map(json.loads, (tmp_path / "streaming" / "timeline" / "trainer_rank_0.jsonl").read_text().splitlines())
    assert sum(span["name"] == "update" and span["step"] == 1 for span in spans) > 2, "several waves and the update"
    assert streaming[2]["mismatch/abs_max"] < 1e-3
