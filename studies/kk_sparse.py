"""Sparse reward, strong teacher: does RLAD help where GRPO has next to nothing to learn from?

Task: Knights and Knaves with two people, as in the demo. Student: the demo's, fine-tuned to surrender; it solves 0.013
of its responses, and in a tenth of the groups of 8 at least one (studies/assets/README.md). Teacher: the demo's, which
solves 0.91.
Hardware: 2 CPU cores. The teacher's evaluation and 43 runs.
"""

from rlad_megatron.config.recipe import apply_overrides
from rlad_megatron.study import Study
from studies.kk_flawed import ASSETS, STEPS, arms, on_puzzles


def kk_sparse() -> Study:
    return Study(
        base=apply_overrides(on_puzzles(), [f"student.path={ASSETS / 'kk_sparse_student'}"]),
        arms=arms(ASSETS / "kk_tiny_traces.jsonl"),
        seeds=(1, 2, 3, 4, 5),
        steps=STEPS,
        baselines=("grpo", "kdrl", "on_policy_kl", "sft"),
    )
