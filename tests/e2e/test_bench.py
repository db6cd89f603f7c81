"""`rlad bench` through the command line, with the teacher on a rank of its own."""

import json
import subprocess

import pytest
from small_run import RLAD

pytestmark = pytest.mark.e2e

FEW = ["rollout.prompts_per_step=2", "train.ranks_per_node=1", "teacher.ranks_per_node=1"]


def test_a_table_and_the_same_figures_as_json(tmp_path):
    output = tmp_path / "results" / "bench.json"
    words = ["bench", "kk_tiny_cpu", *FEW, "--steps", "1", "--output", str(output), f"runs_dir={tmp_path}"]
    process = subprocess.run([*RLAD, *words], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    figures = json.loads(output.read_text())["figures"]
    for name, label in (("perf/mfu", "trainer, MFU"), ("perf/mfu_teacher", "teacher, MFU")):
        (line,) = [line for line in process.stdout.splitlines() if label in line]
        assert f"{figures[name]:.3f}" in line
    assert "memory/teacher_gb" not in figures, "it is on another rank"
    assert (tmp_path / "kk_tiny_cpu" / "bench" / "metrics.jsonl").exists()
