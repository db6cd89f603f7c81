"""A run with a Qwen3.5 student: gated delta nets from the checkpoint to the rollouts and back."""

import json
import subprocess

import pytest
import torch
from ports import free_port
from safetensors.torch import load_file
from small_run import RLAD, SMALL
from transformers import AutoModelForCausalLM

from rlad_megatron.cli import main

pytestmark = pytest.mark.e2e


def test_two_steps_with_gated_delta_nets(tmp_path):
    """On two data-parallel ranks, with a real server; the checkpoint and the export hold the same student."""
    small = [word for word in SMALL[1:] if not word.startswith("student.layout")]
    arguments = [*small, "train.steps=2", f"runs_dir={tmp_path}", "name=hybrid", f"rollout.port={free_port()}"]
    done = subprocess.run(
        [*RLAD, "train", "kk_tiny_qwen3p5_cpu", *arguments], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "hybrid"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {step["step"]: step["mismatch/abs_mean"] for step in steps if "mismatch/abs_mean" in step}
    assert set(found) == {1, 2} and 0 < max(found.values()) < 0.02, found  # nats, bf16 against bf16
    # In the optimizer's float32 copies the weights moved; what is saved is what is exported.
    back = tmp_path / "back"
    words = ["convert", "megatron-to-hf", run / "checkpoints", back, "--config", run / "hf"]
    assert main([str(word) for word in words]) == 0
    exported, saved = load_file(run / "hf" / "model.safetensors"), load_file(back / "model.safetensors")
    assert exported.keys() == saved.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, saved[name].to(tensor.dtype)), name
    assert exported["model.layers.0.linear_attn.A_log"].dtype == torch.float32
    AutoModelForCausalLM.from_pretrained(run / "hf")
