"""RLAD on math: Qwen3-30B-A3B learns from Qwen3-235B-A22B, both with 128 experts, responses up to 30K tokens.

slurm/rlad_235b_to_30b.sh runs this recipe.
Hardware: 80 GPUs of 80 GB, 10 nodes.
Student: the 30B on 4 nodes, tensor parallel 4 (it has 4 key-value heads) with sequence parallelism, context parallel 2,
data parallel 4; 16 of the experts on each rank of a node (expert parallel 8, each expert on one rank).
Teacher: the 235B on 2 nodes, a pipeline stage on each; within a node tensor parallel 4 and expert parallel 8.
Rollouts: 16 vLLM servers of two GPUs each on the other 4 nodes.
Memory: 62.4 GB of 80 on the fullest rank (activations 21.9), 37.3 on the teacher's; a server holds 24 responses
of full length at a time (`rlad plan math_qwen3_30b_a3b_from_235b`). Nothing is recomputed. The planner assumes that
experts get equally many tokens; what is left is also for those that get more.
Models: folders models/Qwen3-30B-A3B and models/Qwen3-235B-A22B, as on the Hugging Face hub.
Prompts and baselines: as in recipes/math_qwen3_8b_base_from_32b.py; objective.name=grpo also needs teacher.nodes=0
teacher.ranks_per_node=0. The pair of models and all sizes here are ours.
"""

from dataclasses import replace

from recipes.math_qwen3_8b_base_from_32b import math_qwen3_8b_base_from_32b
from rlad_megatron.config import LayoutConfig, ModelConfig, RunConfig, TeacherConfig


def math_qwen3_30b_a3b_from_235b() -> RunConfig:
    dense = math_qwen3_8b_base_from_32b()
    within_node = LayoutConfig(tensor_parallel=4, sequence_parallel=True, expert_parallel=8, expert_tensor_parallel=1)
    return replace(
        dense,
        name="math_qwen3_30b_a3b_from_235b",
        student=ModelConfig(path="${models_dir}/Qwen3-30B-A3B", layout=replace(within_node, context_parallel=2)),
        teacher=TeacherConfig(
            path="${models_dir}/Qwen3-235B-A22B",
            layout=replace(within_node, pipeline_parallel=2),
            nodes=2,
            ranks_per_node=8,
        ),
        rollout=replace(dense.rollout, servers=16, tensor_parallel=2),
    )
