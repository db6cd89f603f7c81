"""RLAD on math: DeepSeek-R1-Distill-Qwen-7B learns from DeepSeek-R1-Distill-Qwen-32B, responses up to 30K tokens.

slurm/rlad_32b_to_7b.sh runs this recipe. Student and teacher share a tokenizer and a head size.
Hardware: 64 GPUs of 80 GB, 8 nodes.
Student: the 7B on 4 nodes, tensor parallel 4 (it has 4 key-value heads) with sequence parallelism, data parallel 8.
Teacher: the 32B on the same ranks, tensor parallel 8 within a node, data parallel 4. To give it a ninth node:
teacher.nodes=1 teacher.ranks_per_node=8; then the fullest of the student's ranks holds 56.9 GB.
Rollouts: 32 vLLM servers of one GPU each on the other 4 nodes.
Memory: 65.1 GB of 80 on the fullest rank (activations 37.2, teacher 8.2); a server holds 28 responses
of full length at a time (`rlad plan math_r1_distill_7b_from_32b`). Nothing is recomputed.
Sources, prompts and baselines: as in recipes/math_qwen3_8b_base_from_32b.py. Response length and GPU count are from the
paper's table 2; the pair of models is ours.
"""

from dataclasses import replace

from recipes.math_qwen3_8b_base_from_32b import math_qwen3_8b_base_from_32b
from rlad_megatron.config import LayoutConfig, ModelConfig, RunConfig, TeacherConfig


def math_r1_distill_7b_from_32b() -> RunConfig:
    student = LayoutConfig(tensor_parallel=4, sequence_parallel=True)
    return replace(
        math_qwen3_8b_base_from_32b(),
        name="math_r1_distill_7b_from_32b",
        student=ModelConfig(path="${models_dir}/DeepSeek-R1-Distill-Qwen-7B", layout=student),
        teacher=TeacherConfig(path="${models_dir}/DeepSeek-R1-Distill-Qwen-32B", layout=LayoutConfig(8, 1)),
    )
