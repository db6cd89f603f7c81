"""`rlad bench` on two ranks: every figure of its table, for both models and for the teacher alone."""

import json
import statistics

import pytest
from harness import run_ranks

pytestmark = pytest.mark.multiproc

SMALL = ["rollout.prompts_per_step=2", "rollout.group_size=4", "rollout.sampling.max_tokens=24"]


def measure(rank, world_size, runs):
    from rlad_megatron import platform
    from rlad_megatron.bench import bench, bench_teacher
    from rlad_megatron.config.bench import bench_config
    from rlad_megatron.config.recipe import load_run
    from rlad_megatron.run import LauncherHooks

    platform.setup()
    overrides = [*SMALL, f"runs_dir={runs}", "train.updates_per_rollout=2", "student.layout.tensor_parallel=2"]
    for verb, name in ((bench, "both"), (bench_teacher, "teacher")):
        config = bench_config(load_run("kk_tiny_cpu", [*overrides, f"name={name}"]), steps=2)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        assert verb(config, LauncherHooks(find_teacher=lambda: None))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    run_ranks(measure, 2, str(runs))
    assert len((runs / "both" / "bench" / "metrics.jsonl").read_text().splitlines()) == 3, "one step warms up"
    return {name: json.loads((runs / name / "bench" / "bench.json").read_text()) for name in ("both", "teacher")}


def test_both_models_and_the_way_of_the_weights_are_measured(found):
    figures, rounds = found["both"]["figures"], found["both"]["rounds"]
    assert found["both"]["samples"] == {"count": 8, "tokens": 8 * 12 + 3 * sum(range(1, 9)), "longest_response": 24}
    assert len(rounds["time/step"]) == 2
    for name in ("perf/mfu", "perf/mfu_teacher", "time/old_logprobs", "memory/optimizer_gb", "slowest/update"):
        assert figures[name] == statistics.median(rounds[name]) >= 0
    tokens = found["both"]["samples"]["tokens"]
    assert rounds["teacher/tokens_per_s"] == pytest.approx([tokens / seconds for seconds in rounds["time/teacher"]])
    assert rounds["perf/tokens_per_s"] == pytest.approx([tokens / seconds for seconds in rounds["time/step"]])
    assert figures["tokens/train"] == 3 * sum(range(1, 9))
    assert figures["sync/bytes"] == 3_195_904 and figures["sync/gb_per_s"] > 0  # of the student's safetensors file


def test_the_teacher_alone(found):
    figures = found["teacher"]["figures"]
    assert {"time/teacher", "teacher/tokens_per_s", "perf/mfu_teacher", "memory/teacher_gb"} <= figures.keys()
    assert figures["memory/teacher_gb"] == found["both"]["figures"]["memory/teacher_gb"] > 0
    assert "time/update" not in figures and "sync/seconds" not in figures
