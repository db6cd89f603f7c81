"""A run whose servers work while its ranks train makes the same step as a phased one."""

import json
import subprocess
from pathlib import Path

import pytest
from small_run import RLAD, SMALL, external_server

pytestmark = pytest.mark.e2e

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
