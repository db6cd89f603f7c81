"""The objectives on the demo's models: RLAD, GRPO, KDRL and on-policy distillation, with three seeds.

Task: Knights and Knaves with two people, as in the demo. One evaluation of the teacher, and 12 runs like the demo's but
with a larger held-out set, 512 puzzles with 4 responses each: the standard error of one accuracy is at most 0.022.
"""

from recipes.kk_tiny_cpu import kk_tiny_cpu
from rlad_megatron.config.recipe import apply_overrides
from rlad_megatron.study import Study


def kk_objectives() -> Study:
    return Study(
        base=apply_overrides(kk_tiny_cpu(), ["data.eval_size=512", "eval.samples=4", "observe.tensorboard=false"]),
        arms={
            "trrd": ("objective.name=trrd",),
            "grpo": ("objective.name=grpo",),
            "kdrl": ("objective.name=kdrl",),
            "on_policy_kl": ("objective.name=on_policy_kl",),
        },
        seeds=(1, 2, 3),
        steps=25,
        baselines=("grpo", "kdrl"),
    )
