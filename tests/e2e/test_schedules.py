"""Runs whose servers work while ranks train: the same step as phased, and no prompt lost over kills."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from ports import free_port
from small_run import RLAD, SMALL, external_server

from rlad_megatron.config.recipe import load_run
from rlad_megatron.data.prompts import PromptSource, build_prompts
from rlad_megatron.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.e2e

STEPS, PROMPTS = 5, 8
STUDENT = Path(__file__).parents[2] / "recipes" / "assets" / "kk_tiny_student"
# One group at a time, and one fills a wave.
STREAMING = ["teacher.ranks_per_node=1", "train.microbatch_tokens=64", "rollout.max_concurrency=4"]
QUICK = ["eval.every=0", "checkpoint.export_hf=false", "data.eval_size=16"]


def rlad(*arguments):
    process = subprocess.run([*RLAD, *arguments], capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr


def metrics(folder):
    return {line["step"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def test_a_streaming_step_is_a_phased_one_with_a_dedicated_teacher_too(tmp_path):
    knobs = ["objective.dynamic_sampling=16", "objective.reference_kl=0.1"]
    with external_server(tmp_path, STUDENT, max_concurrency=4) as server:
        for schedule, more in (("phased", []), ("streaming", STREAMING)):
            arguments = [*SMALL, *knobs, *QUICK, *server, "train.steps=2", f"runs_dir={tmp_path}", f"name={schedule}"]
            rlad("train", *arguments, f"rollout.schedule={schedule}", *more)
    phased, streaming = metrics(tmp_path / "phased"), metrics(tmp_path / "streaming")
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


def ahead_run(tmp_path):
    return [
        *[*SMALL, *QUICK, f"runs_dir={tmp_path}", "name=ahead", f"train.steps={STEPS}", "checkpoint.every=1"],
        *["rollout.schedule=ahead", "rollout.ahead=2", "rollout.overprovision=2"],
        *["objective.mismatch_correction=truncated_is", f"rollout.prompts_per_step={PROMPTS}", "objective.name=grpo"],
        *["train.ranks_per_node=1", "student.layout.tensor_parallel=1"],  # starts sooner
        *[f"observe.rollouts_per_step={PROMPTS}", f"rollout.port={free_port()}"],
    ]


def kill_after_a_step(arguments, folder, wait_s):
    """Kill the launcher `wait_s` after the run has made a step more."""
    log = folder / "metrics.jsonl"
    before = max(metrics(folder), default=0) if log.exists() else 0
    said = folder.with_suffix(".log")
    with said.open("w") as file:
        process = subprocess.Popen([*RLAD, "train", *arguments], stdout=file, stderr=file)
    deadline = time.monotonic() + 300
    while not log.exists() or max(metrics(folder), default=0) <= before:
        assert process.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)
    time.sleep(wait_s)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, left = psutil.wait_procs(family, timeout=10)
    for each in left:  # Megatron's checkpoint writer outlives its rank
        each.kill()


@pytest.mark.timeout(1200)
def test_a_killed_run_that_works_ahead_loses_no_prompt_and_uses_none_twice(tmp_path):
    arguments, folder = ahead_run(tmp_path), tmp_path / "ahead"
    wait_s = random.uniform(0.0, 3.0)
    print(f"killed after {wait_s} s")
    kill_after_a_step(arguments, folder, wait_s)
    arguments.append("resume=true")
    rlad("train", *arguments)

    used = []
    for step in range(1, STEPS + 1):
        lines = (folder / "rollouts" / f"step_{step:08d}.jsonl").read_text().splitlines()
        assert len(lines) == PROMPTS
        used += [json.loads(line)["id"] for line in lines]
    assert len({*used}) == len(used) == STEPS * PROMPTS
    state = json.loads((folder / "checkpoints" / f"step_{STEPS:08d}" / "run.json").read_text())["loop"]["prompts"]
    assert state["rounds"] == {}
    config = load_run(arguments[0], arguments[1:])
    source = PromptSource(build_prompts(config.data, load_tokenizer(config.student.path), "train"), config.train.seed)
    drawn = [prompt.id for prompt in source.next_batch(state["position"])]
    assert state["epoch"] == 0 and sorted(used + state["deferred"]) == sorted(drawn)
    lags = [line["rollout/version_lag_max"] for line in metrics(folder).values() if "rollout/version_lag_max" in line]
    assert 1 <= max(lags) <= 2
