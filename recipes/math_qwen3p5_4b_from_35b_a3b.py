"""RLAD on math: Qwen3.5-4B learns from Qwen3.5-35B-A3B, a teacher with 256 experts, responses up to 30K tokens.

slurm/rlad_qwen3p5_35b_to_4b.sh runs this recipe.
Hardware: 16 GPUs of 80 GB, 2 nodes.
Student: the 4B on one node, tensor parallel 4 (it has 4 key-value heads) with sequence parallelism, data parallel 2.
Teacher: the 35B on the same ranks, tensor parallel 2 with sequence parallelism; 32 of the experts on each rank (expert
parallel 8, each expert on one rank).
Rollouts: 8 vLLM servers of one GPU each on the other node.
Memory: 70.7 GB of 80 on the fullest rank (activations 41.9, teacher 10.5); a server has room for 54 responses of full
length at a time (`rlad plan math_qwen3p5_4b_from_35b_a3b`). Nothing is recomputed.
Models, prompts and baselines: as in recipes/math_qwen3p5_2b_from_27b.py.
"""

from dataclasses import replace

from recipes.math_qwen3p5_2b_from_27b import math_qwen3p5_2b_from_27b
from rlad_megatron.config import LayoutConfig, ModelConfig, RunConfig, TeacherConfig


def math_qwen3p5_4b_from_35b_a3b() -> RunConfig:
    teacher = LayoutConfig(tensor_parallel=2, sequence_parallel=True, expert_parallel=8, expert_tensor_parallel=1)
    return replace(
        math_qwen3p5_2b_from_27b(),
        name="math_qwen3p5_4b_from_35b_a3b",
        student=ModelConfig(
            path="${models_dir}/Qwen3.5-4B", layout=LayoutConfig(tensor_parallel=4, sequence_parallel=True)
        ),
        teacher=TeacherConfig(path="${models_dir}/Qwen3.5-35B-A3B", layout=teacher),
    )
