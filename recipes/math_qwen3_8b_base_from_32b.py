"""RLAD on math: Qwen3-8B-Base learns from Qwen3-32B, responses up to 30K tokens (paper, table 2).

Hardware: 64 GPUs of 80 GB, 8 nodes.
Student: Qwen3-8B-Base on 4 nodes, tensor parallel 8 within a node, data parallel 4. Teacher: Qwen3-32B on the same
ranks, tensor parallel 8.
Rollouts: 32 vLLM servers of one GPU each on the other 4 nodes.
Memory: 75.3 GB of 80 on the fullest rank (activations 52.9, teacher 8.2); a server holds 11 responses
of full length at a time (`rlad plan math_qwen3_8b_base_from_32b`).
Baselines: objective.name=grpo or objective.name=kdrl. Set name too, so that each has its own run folder.
Models: folders models/Qwen3-8B-Base and models/Qwen3-32B, as on the Hugging Face hub; models_dir=DIR moves both.
Prompts: DAPO-Math-17k, evaluated on AIME 2024, from the Hugging Face hub (docs/data.md), rewarded by math-verify.

Numbers are from arXiv 2602.22495, table 2: responses of 30K tokens, 64 GPUs; groups of 8, learning rate 1e-6, clip
0.20/0.28, global batch 256, alpha 0.5 and clamp 1 as in its table 1; evaluation at temperature 0.6, top-p 0.95, 32
samples (Mean@32 and Pass@32). Data, steps, layout and the split between trainer and servers are ours.
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

RESPONSE_TOKENS = 30 * 1024


def math_qwen3_8b_base_from_32b() -> RunConfig:
    return RunConfig(
        name="math_qwen3_8b_base_from_32b",
        student=ModelConfig(path="${models_dir}/Qwen3-8B-Base", layout=LayoutConfig(8, 1)),
        teacher=TeacherConfig(path="${models_dir}/Qwen3-32B", layout=LayoutConfig(8, 1)),
        data=DataConfig(source="dapo_math_17k", eval_source="aime24"),
        rollout=RolloutConfig(
            group_size=8,
            prompts_per_step=32,
            sampling=SamplingConfig(temperature=1.0, max_tokens=RESPONSE_TOKENS),
            nodes=4,
            servers=32,
            max_concurrency=16,
            request_timeout_s=3600.0,
        ),
        optimizer=OptimizerConfig(lr=1e-6),
        train=TrainConfig(
            steps=300, nodes=4, ranks_per_node=8, microbatch_tokens=31 * 1024, distributed_timeout_s=14400.0
        ),
        eval=EvalConfig(
            every=50, samples=32, sampling=SamplingConfig(temperature=0.6, top_p=0.95, max_tokens=RESPONSE_TOKENS)
        ),
        checkpoint=CheckpointConfig(every=25),
    )
