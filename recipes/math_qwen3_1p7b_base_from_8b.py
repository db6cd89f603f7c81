"""RLAD on math: Qwen3-1.7B-Base learns from Qwen3-8B, responses up to 30K tokens (paper, table 2).

Hardware: 64 GPUs of 80 GB, 8 nodes.
Student: Qwen3-1.7B-Base on 4 nodes, tensor parallel 2, data parallel 16. Teacher: Qwen3-8B on the same ranks, tensor
parallel 2.
Rollouts: 32 vLLM servers of one GPU each on the other 4 nodes.
Memory: 59.3 GB of 80 on the fullest rank (activations 39.4, teacher 8.2); a server holds 17 responses
of full length at a time (`rlad plan math_qwen3_1p7b_base_from_8b`).
Sources, prompts and baselines: as in recipes/math_qwen3_8b_base_from_32b.py.
"""

from dataclasses import replace

from recipes.math_qwen3_8b_base_from_32b import math_qwen3_8b_base_from_32b
from rlad_megatron.config import LayoutConfig, ModelConfig, RunConfig, TeacherConfig


def math_qwen3_1p7b_base_from_8b() -> RunConfig:
    return replace(
        math_qwen3_8b_base_from_32b(),
        name="math_qwen3_1p7b_base_from_8b",
        student=ModelConfig(path="${models_dir}/Qwen3-1.7B-Base", layout=LayoutConfig(2, 1)),
        teacher=TeacherConfig(path="${models_dir}/Qwen3-8B", layout=LayoutConfig(2, 1)),
    )
