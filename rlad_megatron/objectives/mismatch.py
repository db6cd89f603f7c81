"""The gap between the trainer's and the sampler's log-probs of the same tokens.

The sampler (vLLM) and the trainer (Megatron) run different kernels, so the sampling policy is not exactly pi_old.
N is the number of loss-carrying tokens; every tensor is float32 [N], log-probs in nats.
"""

from __future__ import annotations

import torch

BINS = 256  # of gaps in nats: one below and one above the range, the others evenly in its logarithm
LOG10_RANGE = (-7.0, 2.0)


def mismatch_weights(
    old_log_probs: torch.Tensor, sampler_log_probs: torch.Tensor, *, correction: str, cap: float
) -> torch.Tensor:
    """Factors [N] for the token weights, detached, from the ratio m = pi_old / pi_sampler.

    none: 1. truncated_is (truncated importance sampling): min(m, cap). icepop: m if 1 / cap <= m <= cap, else 0, which
    masks the token.

    Raises:
        ValueError: unknown correction, or a cap below 1.
    """
    if not cap >= 1:
        raise ValueError(f"mismatch_cap must be at least 1, got {cap}")
    ratio = (old_log_probs.detach() - sampler_log_probs.detach()).exp()
    if correction == "none":
        return torch.ones_like(ratio)
    if correction == "truncated_is":
        return ratio.clamp(max=cap)
    if correction == "icepop":
        return ratio.where((ratio >= 1.0 / cap) & (ratio <= cap), 0.0)
    raise ValueError(f"mismatch_correction {correction!r} is unknown; choose one of: none, truncated_is, icepop")


def mismatch_stats(
    old_log_probs: torch.Tensor, sampler_log_probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum, maximum and histogram [BINS] of |log pi_old - log pi_sampler| in nats, detached; 0 without tokens."""
    gap = (old_log_probs.detach() - sampler_log_probs.detach()).abs()
    edges = torch.logspace(*LOG10_RANGE, BINS - 1, device=gap.device)
    # Not bincount, which makes the host wait for a GPU.
    histogram = gap.new_zeros(BINS).scatter_add_(0, torch.bucketize(gap, edges), torch.ones_like(gap))
    return gap.sum(), gap.max() if gap.numel() else gap.sum(), histogram


def histogram_quantile(histogram: torch.Tensor, share: float) -> float:
    """The gap that `share` of the tokens do not exceed: the upper edge of its bin, at most 10% too large; in nats."""
    index = int(torch.searchsorted(histogram.cumsum(0), share * histogram.sum()))
    return 10 ** (LOG10_RANGE[0] + index / (BINS - 2) * (LOG10_RANGE[1] - LOG10_RANGE[0]))
