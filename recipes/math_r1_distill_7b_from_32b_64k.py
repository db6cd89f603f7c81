"""RLAD on math: DeepSeek-R1-Distill-Qwen-7B learns from DeepSeek-R1-Distill-Qwen-32B, responses up to 64K tokens.

Hardware, models and teacher's layout: as in recipes/math_r1_distill_7b_from_32b.py. Both models have 131,072 positions.
Student: context parallel 2 too: a rank holds half of each sequence; data parallel 4.
Memory: 66.9 GB of 80 on the fullest rank (activations 39.0, teacher 8.2); a server holds 13 responses
of full length at a time (`rlad plan math_r1_distill_7b_from_32b_64k`). Nothing is recomputed.
Sources, prompts and baselines: as in recipes/math_qwen3_8b_base_from_32b.py.
"""

from dataclasses import replace

from recipes.math_r1_distill_7b_from_32b import math_r1_distill_7b_from_32b
from rlad_megatron.config import RunConfig

RESPONSE_TOKENS = 64 * 1024


def math_r1_distill_7b_from_32b_64k() -> RunConfig:
    shorter = math_r1_distill_7b_from_32b()
    rollout, evaluation = shorter.rollout, shorter.eval
    return replace(
        shorter,
        name="math_r1_distill_7b_from_32b_64k",
        student=replace(shorter.student, layout=replace(shorter.student.layout, context_parallel=2)),
        rollout=replace(
            rollout,
            sampling=replace(rollout.sampling, max_tokens=RESPONSE_TOKENS),
            request_timeout_s=2 * rollout.request_timeout_s,
        ),
        train=replace(
            shorter.train,
            microbatch_tokens=65 * 1024,
            distributed_timeout_s=2 * shorter.train.distributed_timeout_s,
        ),
        eval=replace(evaluation, sampling=replace(evaluation.sampling, max_tokens=RESPONSE_TOKENS)),
    )
