"""Group-relative advantages (GRPO, arXiv 2402.03300; RLAD, arXiv 2602.22495, section 2; Dr. GRPO, arXiv 2503.20783).

Shape letters: P prompts, G responses to each prompt.
"""

from __future__ import annotations

import torch


def group_advantages(rewards_PG: torch.Tensor, *, std: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A = (R - mean(R)) / std(R) over each group, with the population standard deviation.

    Args:
        rewards_PG: [P, G] finite rewards, any real dtype.
        std: False leaves out the division, as Dr. GRPO does: A = R - mean(R). Groups that are nearly all right or all
            wrong then weigh less than the others, not more.

    Returns:
        advantages_PG: float32 [P, G].
        kept_P: bool [P]. False where all rewards of a group are equal; such a group does not say which response is
            better, so its advantages are 0. An objective that `drops_zero_advantage` (config/objectives.py) skips its
            forward pass, but its responses still count in the mean (`aggregate.token_weights`).

    Raises:
        ValueError: rewards are not two-dimensional, or not finite.
    """
    if rewards_PG.dim() != 2:
        raise ValueError(f"rewards_PG must have shape [prompts, group], got {tuple(rewards_PG.shape)}")
    rewards_PG = rewards_PG.double()
    if not torch.isfinite(rewards_PG).all():
        raise ValueError("rewards_PG must be finite; a reward function returned NaN or infinity")
    # Rewards are compared exactly. The std of eight times 0.1 is rounding noise, and dividing by it would give +-1.
    kept_P = (rewards_PG != rewards_PG[:, :1]).any(dim=1)
    centered_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if std:
        std_P = centered_PG.square().mean(dim=1).sqrt().where(kept_P, 1.0)
        centered_PG = centered_PG / std_P[:, None]
    return centered_PG.where(kept_P[:, None], 0.0).float(), kept_P
