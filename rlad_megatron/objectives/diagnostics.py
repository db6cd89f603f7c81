"""Where the teacher acts: sums over tokens by the sign of the advantage and by which of student and teacher is above.

N is the number of loss-carrying tokens. Nothing here has a gradient.
"""

from __future__ import annotations

import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.objectives.grpo import grpo
from rlad_megatron.types import TokenBatch

Shares = dict[str, torch.Tensor]  # metric -> [2]: a sum over tokens, and what it is divided by, once, over all ranks


@torch.no_grad()
def teacher_shares(stats: dict[str, torch.Tensor], batch: TokenBatch, config: ObjectiveConfig) -> Shares:
    """The metrics `trrd/...` that are shares of some of the tokens (docs/method.md, "What to watch").

    Args:
        stats: [N] tensors: `log_probs` of the student, and what the objective reports. Nothing without `teacher_gap`.
        batch: with pi_old, and with `solved` if the responses have a reward.

    Returns:
        float64 [2] each: for responses solved and not the sum of the gap and the number of tokens. If the objective
        clips, for each of four kinds of tokens (A > 0 or A < 0, pi_S > pi_T or not) the clipped ones and all. For
        `trrd` also the sum over them of |d surrogate / d log pi_S| over that of GRPO.
    """
    if "teacher_gap" not in stats:
        return {}
    gap_N, advantage_N = stats["teacher_gap"], batch.advantage
    shares = {}
    if batch.solved is not None:
        for name, of_N in (("solved", batch.solved), ("unsolved", 1 - batch.solved)):
            shares[f"trrd/teacher_gap_{name}"] = _over(gap_N * of_N, of_N)
    if "clipped" not in stats:
        return shares
    kinds = {
        f"{sign}_{side}": (of_sign & of_side).double()
        for sign, of_sign in (("positive", advantage_N > 0), ("negative", advantage_N < 0))
        for side, of_side in (("above", gap_N > 0), ("below", gap_N <= 0))
    }
    for kind, of_N in kinds.items():
        shares[f"trrd/clip_{kind}"] = _over(stats["clipped"] * of_N, of_N)
    if config.name == "trrd":
        # d log r / d log pi_S is 1, or alpha alone where the clamp binds.
        slope_N = torch.where(stats["clamped"], config.alpha, 1.0)
        own_N = _pull(stats, advantage_N) * slope_N
        clip = {"eps_low": config.eps_low, "eps_high": config.eps_high}
        _, of_grpo = grpo(stats["log_probs"], batch.with_old(stats["log_probs"]).old_log_probs, advantage_N, **clip)
        grpo_N = _pull(of_grpo, advantage_N)
        for kind, of_N in kinds.items():
            shares[f"trrd/weight_{kind}"] = _over(own_N * of_N, grpo_N * of_N)
    return shares


def _pull(stats: dict[str, torch.Tensor], advantage_N: torch.Tensor) -> torch.Tensor:
    """|d surrogate / d log r|: r * |A|, and 0 where the clip is active."""
    return torch.where(stats["clipped"], 0.0, stats["ratio"] * advantage_N.abs())


def _over(values_N: torch.Tensor, of_N: torch.Tensor) -> torch.Tensor:
    return torch.stack([values_N.double().sum(), of_N.double().sum()])
