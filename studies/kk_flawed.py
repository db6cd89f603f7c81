"""A teacher that is wrong in a systematic way: does RLAD follow it where it is right, and leave it where it is wrong?

Task: Knights and Knaves with two people, as in the demo. Student: the demo's. Teacher: the demo's, fine-tuned to read
"iff" as "either or". It solves 0.56 of the puzzles, surely and with consistent reasoning; a student that imitates it
everywhere cannot do much better (studies/assets/README.md).
Hardware: 2 CPU cores. The teacher's evaluation and 43 runs.
"""

from pathlib import Path

from recipes.kk_tiny_cpu import kk_tiny_cpu
from rlad_megatron.config import RunConfig
from rlad_megatron.config.recipe import apply_overrides
from rlad_megatron.study import Study, Tuned

ASSETS = Path(__file__).parent / "assets"
STEPS = 24


def kk_flawed() -> Study:
    base = apply_overrides(on_puzzles(), [f"teacher.path={ASSETS / 'kk_xor_teacher'}"])
    return Study(
        base=base,
        arms=arms(ASSETS / "kk_xor_traces.jsonl"),
        seeds=(1, 2, 3, 4, 5),
        steps=STEPS,
        baselines=("grpo", "kdrl", "on_policy_kl", "sft"),
    )


def on_puzzles() -> RunConfig:
    """The demo with 512 held-out puzzles and 4 responses to each: standard error of one accuracy at most 0.022."""
    return apply_overrides(
        kk_tiny_cpu(),
        [
            *("data.eval_size=512", "eval.samples=4", "eval.every=8"),
            *("checkpoint.every=12", "observe.tensorboard=false", "objective.reference_drift=true"),
        ],
    )


def arms(traces: Path) -> dict[str, tuple[str, ...] | Tuned]:
    """RLAD at three alphas, what it is compared with, and offline distillation.

    traces: solved ones of the teacher (`rlad generate`). The arm learns from as many responses as the others sample, so
    from each trace about four times.
    """
    coefficients = (0.002, 0.02, 0.2)
    return {
        "trrd_0.5": ("objective.name=trrd", "objective.alpha=0.5"),
        "grpo": ("objective.name=grpo",),
        "kdrl": Tuned(
            {f"{c:g}": ("objective.name=kdrl", f"objective.kl_coefficient={c}") for c in coefficients}, seed=0
        ),
        "on_policy_kl": ("objective.name=on_policy_kl",),
        "sft": (
            *("objective.name=cross_entropy", "objective.aggregation=token_mean", "objective.reference_drift=false"),
            *(f"sft.traces={traces}", "sft.batch_size=256"),  # prompts_per_step * group_size
        ),
        "trrd_0.25": ("objective.name=trrd", "objective.alpha=0.25"),
        "trrd_0.75": ("objective.name=trrd", "objective.alpha=0.75"),
        # The clip of rho at [1/3, 3] is its authors'.
        "distilled_rl": ("objective.name=distilled_rl", "objective.teacher_clamp=1.0986"),
    }
