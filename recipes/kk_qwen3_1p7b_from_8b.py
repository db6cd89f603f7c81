"""RLAD on Knights and Knaves: Qwen3-1.7B learns from Qwen3-8B, responses up to 8K tokens (paper, table 1).

Hardware: one node with 8 GPUs of 80 GB.
Student: Qwen3-1.7B on GPUs 0-3, data parallel 4. Teacher: Qwen3-8B on the same four, a full copy on each.
Rollouts: four vLLM servers on GPUs 4-7, one GPU each.
Memory: 71.7 GB of 80 on the fullest rank (activations 33.1, teacher 16.4); a server holds 61 responses
of full length at a time (`rlad plan kk_qwen3_1p7b_from_8b`).
Sources, 2K responses and baselines: as in recipes/kk_qwen3_0p6b_from_8b.py.
"""

from dataclasses import replace

from recipes.kk_qwen3_0p6b_from_8b import kk_qwen3_0p6b_from_8b
from rlad_megatron.config import ModelConfig, RunConfig


def kk_qwen3_1p7b_from_8b() -> RunConfig:
    smaller = kk_qwen3_0p6b_from_8b()
    return replace(
        smaller,
        name="kk_qwen3_1p7b_from_8b",
        student=ModelConfig(path="${models_dir}/Qwen3-1.7B"),
        train=replace(smaller.train, microbatch_tokens=16384),
    )
