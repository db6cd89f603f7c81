"""Whole runs through the command line, on the demo's models: artefacts, resume after a kill, the exported student."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from itertools import product
from pathlib import Path

import psutil
import pytest
import torch
from ports import free_port
from safetensors.torch import load_file
from small_run import RLAD, SMALL
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.e2e

# Differ between runs of the same seed: clocks and memory.
MEASURED_AGAIN = ("time/", "idle/", "memory/", "sync/", "perf/", "slowest/")
# Of a teacher on the trainer's ranks only.
ON_RANKS = {"memory/teacher_gb", "slowest/teacher", "slowest/teacher_over_mean"}


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
def uninterrupted(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    out = rlad("train", *SMALL, f"runs_dir={runs}", "name=whole", f"rollout.port={free_port()}")
    return runs / "whole", out


def test_a_run_leaves_what_it_promises(uninterrupted):
    folder, out = uninterrupted
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
        *ON_RANKS,
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


def test_the_teachers_precision_is_measured_on_the_rollouts_of_a_run(uninterrupted):
    folder, _ = uninterrupted
    out = rlad("evaluate", "--teacher-gap", str(folder / "config.yaml"), "teacher.precision=bf16")
    assert "teacher in bf16 against fp32" in out and "clip decisions flipped" in out
    gap = json.loads((folder / "teacher_gap.json").read_text())
    rollouts = [json.loads(line) for file in (folder / "rollouts").iterdir() for line in file.read_text().splitlines()]
    assert (gap["rollouts"], gap["tokens"]) == (24, sum(len(rollout["response_tokens"]) for rollout in rollouts))
    assert 1e-5 < gap["abs_mean"] < gap["abs_p99"] < gap["abs_max"] < 2.0
    assert 0 < gap["clamped"] < 0.5 and gap["clamp_flipped"] < 0.1 and gap["clip_flipped"] < 0.1


def test_the_weights_moved_and_the_export_loads(uninterrupted):
    folder, _ = uninterrupted
    before = load_file(Path("recipes/assets/kk_tiny_student/model.safetensors"))
    after = load_file(folder / "hf" / "model.safetensors")
    assert set(before) == set(after)
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    assert torch.equal(model.model.norm.weight, after["model.norm.weight"])


def test_the_checkpoint_of_a_run_converts_to_its_export(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    rlad("convert", "megatron-to-hf", str(folder / "checkpoints"), str(tmp_path / "hf"), "--config", str(folder / "hf"))
    converted, export = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", folder / "hf"))
    assert converted.keys() == export.keys()
    assert all(torch.equal(converted[name].to(export[name].dtype), export[name]) for name in export)


def test_the_export_scores_in_vllm_as_the_run_did(uninterrupted):
    folder, _ = uninterrupted
    out = rlad("evaluate", *SMALL, f"student.path={folder / 'hf'}", f"rollout.port={free_port()}")
    assert f"{metrics(folder)[3]['eval/accuracy']:.3f}" in out


@pytest.mark.timeout(1200)  # two runs, each of which starts a server
def test_a_killed_run_resumes_as_if_nothing_had_happened(uninterrupted, tmp_path):
    """Here with the teacher on dedicated ranks, which changes no figure: the other run has it on the trainer's."""
    port = free_port()
    arguments = [*SMALL, f"runs_dir={tmp_path}", "name=cut", f"rollout.port={port}", "teacher.ranks_per_node=1"]
    background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # as a script's `rlad train &`
    process = subprocess.Popen(
        [*background, *RLAD, "train", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    latest = tmp_path / "cut" / "checkpoints" / "latest"
    deadline = time.monotonic() + 600
    while not (latest.exists() and latest.read_text() == "2"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    said = (tmp_path / "cut" / "logs" / "teacher_0.log").read_text()
    teacher = ("127.0.0.1", int(re.search(r"^the teacher answers at http://127.0.0.1:(\d+)$", said, re.MULTILINE)[1]))
    # Ranks, teacher and server end with their parent.
    while 0 in [socket.socket().connect_ex(address) for address in (("127.0.0.1", port), teacher)]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []

    before = metrics(tmp_path / "cut")
    for step in (0, 1, 2):  # the teacher speaks in step 1, and step 2 samples from what it taught
        for key, value in metrics(uninterrupted[0])[step].items():
            if not key.startswith(MEASURED_AGAIN):
                assert before[step][key] == pytest.approx(value, rel=1e-6, abs=1e-6), (step, key)
    rlad("train", *arguments, "resume=true")
    assert "resume: false" in (tmp_path / "cut" / "config.yaml").read_text()  # as RECIPE it starts a new run
    resumed, whole = metrics(tmp_path / "cut"), metrics(uninterrupted[0])
    assert sorted(resumed) == [0, 1, 2, 3] and every_rank_has_each_step_once(tmp_path / "cut")
    assert set(resumed[3]) | ON_RANKS == set(whole[3])
    for key, value in whole[3].items():
        if not key.startswith(MEASURED_AGAIN):
            assert resumed[3][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
