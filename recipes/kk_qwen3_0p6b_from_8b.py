"""RLAD on Knights and Knaves: Qwen3-0.6B learns from Qwen3-8B, responses up to 8K tokens (paper, table 1).

Hardware: one node with 8 GPUs of 80 GB.
Student: Qwen3-0.6B on GPUs 0-3, data parallel 4. Teacher: Qwen3-8B on the same four, a full copy on each.
Rollouts: four vLLM servers on GPUs 4-7, one GPU each.
Memory: 69.8 GB of 80 on the fullest rank (activations 41.5, teacher 16.4); a server holds 63 responses
of full length at a time (`rlad plan kk_qwen3_0p6b_from_8b`).
2K responses: rollout.sampling.max_tokens=2048 eval.sampling.max_tokens=2048.
Baselines: objective.name=grpo or objective.name=kdrl. Set name too, so that each has its own run folder.
Models: folders models/Qwen3-0.6B and models/Qwen3-8B, as on the Hugging Face hub; models_dir=DIR moves both. They share
a tokenizer.

Numbers are from arXiv 2602.22495, table 1: groups of 8, learning rate 1e-6, clip 0.20/0.28, global batch of 256
responses (32 prompts), alpha 0.5, clamp 1, no KL to a reference. The paper's micro-batch of 32 responses has no
counterpart: micro-batches are packed by tokens (12 full-length responses over the four ranks, or more shorter ones),
and the gradient does not depend on how. Steps, puzzles and layout are ours.
"""

from rlad_megatron.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TeacherConfig,
    TrainConfig,
)


def kk_qwen3_0p6b_from_8b() -> RunConfig:
    return RunConfig(
        name="kk_qwen3_0p6b_from_8b",
        student=ModelConfig(path="${models_dir}/Qwen3-0.6B", layout=LayoutConfig(1, 1)),
        teacher=TeacherConfig(path="${models_dir}/Qwen3-8B", layout=LayoutConfig(1, 1)),
        data=DataConfig(people=(2, 3, 4, 5, 6, 7, 8), prompt_style="chat", train_size=1024, eval_size=700),
        rollout=RolloutConfig(
            group_size=8,
            prompts_per_step=32,
            sampling=SamplingConfig(temperature=1.0, max_tokens=8192),
            servers=4,
            max_concurrency=64,
            request_timeout_s=1500.0,
        ),
        optimizer=OptimizerConfig(lr=1e-6),
        train=TrainConfig(steps=300, ranks_per_node=4, microbatch_tokens=32768, distributed_timeout_s=7200.0),
        eval=EvalConfig(every=20, sampling=SamplingConfig(temperature=0.6, top_p=0.95, max_tokens=8192)),
        checkpoint=CheckpointConfig(every=25),
    )
