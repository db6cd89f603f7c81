"""The demo with a Qwen3.5 student: gated delta nets on a machine without a GPU.

Method and task: as in kk_tiny_cpu.
Student: Qwen3.5 with 1.0 M parameters, three gated delta nets and one layer of attention, in bf16.
Teacher: that of kk_tiny_cpu, Qwen3 with 2.4 M parameters.
Rollouts: one vLLM server in bf16, the only precision in which its CPU build runs gated delta nets.
Hardware: 2 CPU cores, under 10 GB in total. Numbers: those of kk_tiny_cpu, fewer steps.
"""

from dataclasses import replace

from recipes.kk_tiny_cpu import ASSETS, kk_tiny_cpu
from rlad_megatron.config import ModelConfig, RunConfig


def kk_tiny_qwen3p5_cpu() -> RunConfig:
    demo = kk_tiny_cpu()
    return replace(
        demo,
        name="kk_tiny_qwen3p5_cpu",
        student=ModelConfig(path=str(ASSETS / "kk_tiny_qwen3p5_student"), precision="bf16"),
        rollout=replace(demo.rollout, dtype="bfloat16"),
        train=replace(demo.train, steps=10),
        checkpoint=replace(demo.checkpoint, export_precision="bf16"),
    )
