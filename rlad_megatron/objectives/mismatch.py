"""The gap between the trainer's and the sampler's log-probs of the same tokens: measured, and corrected on request.

The sampler (vLLM) and the trainer (Megatron) run different kernels, so the tokens come from a policy that is not
exactly pi_old. N is the number of loss-carrying tokens; every tensor is float32 [N], log-probs in nats.
"""

from __future__ import annotations

import torch


def truncated_is(old_log_probs: torch.Tensor, sampler_log_probs: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated importance sampling: min(pi_old / pi_sampler, cap), detached [N]. `cap` is at least 1."""
    return (old_log_probs.detach() - sampler_log_probs.detach()).exp().clamp(max=cap)


def icepop(old_log_probs: torch.Tensor, sampler_log_probs: torch.Tensor, cap: float) -> torch.Tensor:
    """IcePop: pi_old / pi_sampler where it lies in [1 / cap, cap], else 0, so the token is masked. Detached [N]."""
    ratio = (old_log_probs.detach() - sampler_log_probs.detach()).exp()
    return ratio.where((ratio >= 1.0 / cap) & (ratio <= cap), 0.0)


CORRECTIONS = {"truncated_is": truncated_is, "icepop": icepop}


def mismatch_weights(
    old_log_probs: torch.Tensor, sampler_log_probs: torch.Tensor, *, correction: str, cap: float
) -> torch.Tensor:
    """Factors [N] for the token weights, by the config's name of the correction; "none" gives ones.

    Raises:
        ValueError: unknown correction, or a cap below 1.
    """
    if correction == "none":
        return torch.ones_like(old_log_probs)
    if correction not in CORRECTIONS:
        raise ValueError(
            f"mismatch_correction {correction!r} is unknown; choose one of: none, {', '.join(CORRECTIONS)}"
        )
    if not cap >= 1:
        raise ValueError(f"mismatch_cap must be at least 1, got {cap}")
    return CORRECTIONS[correction](old_log_probs, sampler_log_probs, cap)


def mismatch_stats(old_log_probs: torch.Tensor, sampler_log_probs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parts of |log pi_old - log pi_sampler| in nats, each a scalar, that combine over micro-batches and ranks.

    `abs_sum` and `count` add up (their quotient is `mismatch/abs_mean`); of `abs_max` the maximum is taken.
    No tokens give zeros.
    """
    gap = (old_log_probs.detach() - sampler_log_probs.detach()).abs()
    count = torch.tensor(float(gap.numel()), device=gap.device)
    return {"abs_sum": gap.sum(), "count": count, "abs_max": gap.max() if gap.numel() else gap.sum()}
