"""Accuracy, Mean@K and Pass@K of rewarded rollouts, over all prompts and by subset."""

from __future__ import annotations

import math

from rlad_megatron.types import Rollout


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k responses solves the prompt, from `solved` of `samples`.

    1 - C(n - c, k) / C(n, k), Chen et al., arXiv 2107.03374, eq. 1.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must be from 1 to the {samples} samples")
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def accuracy_metrics(groups: list[list[Rollout]]) -> dict[str, float]:
    """Metrics of an evaluation with K responses to each prompt.

    `eval/accuracy` is the share of solved responses, averaged over prompts, and so is `eval/accuracy/<subset>`.
    With K > 1 also `eval/mean@K` (the same figure under its usual name) and `eval/pass@k` for k = 2, 4, ... and K.
    """
    k_total = len(groups[0])
    solved = [sum(rollout.solved for rollout in group) for group in groups]
    metrics = {"eval/accuracy": _mean([count / k_total for count in solved])}
    subsets = sorted({group[0].prompt.subset for group in groups})
    if len(subsets) > 1:
        for subset in subsets:
            shares = [
                count / k_total for count, group in zip(solved, groups, strict=True) if group[0].prompt.subset == subset
            ]
            metrics[f"eval/accuracy/{subset}"] = _mean(shares)
    metrics["eval/response_tokens"] = _mean([float(len(rollout.tokens)) for group in groups for rollout in group])
    if k_total > 1:
        metrics[f"eval/mean@{k_total}"] = metrics["eval/accuracy"]
        for k in sorted({2**power for power in range(1, k_total.bit_length()) if 2**power <= k_total} | {k_total}):
            metrics[f"eval/pass@{k}"] = _mean([pass_at_k(k_total, count, k) for count in solved])
    return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
