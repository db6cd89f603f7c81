"""The demo: RLAD on a machine without a GPU, in a few minutes.

Method: RLAD, alpha 0.5, clamp 1, clip 0.20/0.28, groups of 8 (the paper's defaults; the learning rate suits a tiny
model). Task: Knights and Knaves with two people, in words.
Student: Qwen3 with 0.8 M parameters, on two ranks, data parallel; it can reason but mostly guesses.
Teacher: Qwen3 with 2.4 M parameters, on the same ranks.
Rollouts: one vLLM server (CPU build), new weights after every step.
Hardware: 2 CPU cores, under 8 GB in total. Numbers: chosen by experiment (README, "What the demo shows").
"""

from pathlib import Path

from rlad_megatron.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TeacherConfig,
    TrainConfig,
)

ASSETS = Path(__file__).parent / "assets"


def kk_tiny_cpu() -> RunConfig:
    return RunConfig(
        name="kk_tiny_cpu",
        student=ModelConfig(path=str(ASSETS / "kk_tiny_student"), precision="fp32"),
        teacher=TeacherConfig(path=str(ASSETS / "kk_tiny_teacher"), precision="fp32"),
        data=DataConfig(people=(2,), prompt_style="plain", train_size=4096, eval_size=256),
        rollout=RolloutConfig(
            group_size=8,
            prompts_per_step=32,
            sampling=SamplingConfig(temperature=1.0, max_tokens=96),
            dtype="float32",
            max_concurrency=256,
            kv_cache_gb=0.25,
        ),
        optimizer=OptimizerConfig(lr=3e-4, warmup_steps=2, decay="constant"),
        train=TrainConfig(steps=25, ranks_per_node=2, gpus_per_node=0, microbatch_tokens=2560),
        eval=EvalConfig(every=5, sampling=SamplingConfig(temperature=0.6, top_p=0.95, max_tokens=96), teacher=True),
        checkpoint=CheckpointConfig(every=10, keep=2, export_precision="fp32"),
    )
