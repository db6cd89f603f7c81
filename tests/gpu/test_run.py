"""The demo on one GPU: trainer, teacher and server share it, and every sync is checked by a decode probe."""

import json
import subprocess
import sys

import pytest

from rlad_megatron.config import validate
from rlad_megatron.config.recipe import load_run

ONE_GPU = [
    "train.gpus_per_node=1",
    "train.ranks_per_node=1",
    "student.layout.tensor_parallel=1",
    "student.precision=bf16",
    "teacher.precision=bf16",
    "rollout.dtype=bfloat16",
    "rollout.colocate=true",
    "rollout.gpu_memory_utilization=0.3",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "train.steps=2",
    "data.train_size=64",
    "data.eval_size=32",
    "eval.every=0",
    "eval.teacher=false",
]
# Where Transformer Engine cannot be used.
LOCAL_LAYERS = ["student.transformer_impl=local", "teacher.transformer_impl=local"]


@pytest.mark.parametrize("layers", [[], LOCAL_LAYERS], ids=["auto", "local"])
def test_the_run_is_a_valid_one(layers):
    validate(load_run("kk_tiny_cpu", ONE_GPU + layers))


@pytest.mark.gpu
def test_the_demo_runs_and_its_servers_hold_the_new_weights(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import gpu_steps

    overrides = ONE_GPU + (LOCAL_LAYERS if gpu_steps.transformer_engine_missing() else [])
    command = [sys.executable, "-m", "rlad_megatron.cli", "train", "kk_tiny_cpu"]
    done = subprocess.run([*command, *overrides, f"runs_dir={tmp_path}"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "kk_tiny_cpu" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    assert len(steps) == 2 and all(line["sync/probe_abs_max"] < 0.1 and line["grad_norm"] > 0 for line in steps)
