"""RLAD on math: Qwen3.5-2B learns from Qwen3.5-27B, both with gated delta nets, responses up to 30K tokens.

slurm/rlad_qwen3p5_27b_to_2b.sh runs this recipe.
Hardware: 16 GPUs of 80 GB, 2 nodes.
Student: the 2B on one node, tensor parallel 2 (it has 2 key-value heads) with sequence parallelism, data parallel 4.
Teacher: the 27B on the same ranks, tensor parallel 4 with sequence parallelism, data parallel 2.
Rollouts: 8 vLLM servers of one GPU each on the other node. A request holds keys and values in every fourth layer only.
Memory: 67.2 GB of 80 on the fullest rank (activations 38.5, teacher 13.4); a server has room for 156 responses of full
length at a time (`rlad plan math_qwen3p5_2b_from_27b`). Nothing is recomputed.
Models: the text models of Qwen3.5-2B and Qwen3.5-27B on the Hugging Face hub. Those have a vision tower too;
`rlad convert hf-to-hf` writes the text model of the student, which the servers need, and with --like makes the result
a whole Qwen3.5 again (docs/conversion.md).
Prompts and baselines: as in recipes/math_qwen3_8b_base_from_32b.py, with thinking switched on in the chat template.
The pair of models and all sizes here are ours.
"""

from dataclasses import replace

from recipes.math_qwen3_8b_base_from_32b import math_qwen3_8b_base_from_32b
from rlad_megatron.config import LayoutConfig, ModelConfig, RunConfig, TeacherConfig


def math_qwen3p5_2b_from_27b() -> RunConfig:
    dense = math_qwen3_8b_base_from_32b()
    student = LayoutConfig(tensor_parallel=2, sequence_parallel=True)
    teacher = LayoutConfig(tensor_parallel=4, sequence_parallel=True)
    return replace(
        dense,
        name="math_qwen3p5_2b_from_27b",
        student=ModelConfig(path="${models_dir}/Qwen3.5-2B", layout=student),
        teacher=TeacherConfig(path="${models_dir}/Qwen3.5-27B", layout=teacher),
        data=replace(dense.data, chat_template_kwargs={"enable_thinking": True}),
        rollout=replace(dense.rollout, nodes=1, servers=8, max_concurrency=32),
        train=replace(dense.train, nodes=1),
    )
