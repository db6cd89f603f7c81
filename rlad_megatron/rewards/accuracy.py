"""Accuracy, Mean@K and Pass@K of rewarded rollouts, over all prompts and by subset."""

from __future__ import annotations

import math
from statistics import fmean

from rlad_megatron.types import Rollout


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k <= samples responses solves the prompt; `solved` of them did.

    1 - C(n - c, k) / C(n, k), Chen et al., arXiv 2107.03374, eq. 1.
    """
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def accuracy_metrics(groups: list[list[Rollout]]) -> dict[str, float]:
    """Metrics of an evaluation with K responses to each prompt.

    `eval/accuracy` is the share of solved responses, averaged over prompts; `eval/accuracy/<subset>` likewise.
    K > 1 adds `eval/mean@K` (accuracy under its usual name) and `eval/pass@k` for k = 2, 4, ... and K.
    """
    k_total = len(groups[0])
    solved = [sum(rollout.solved for rollout in group) for group in groups]
    by_subset: dict[str, list[float]] = {}
    for count, group in zip(solved, groups, strict=True):
        by_subset.setdefault(group[0].prompt.subset, []).append(count / k_total)
    metrics = {"eval/accuracy": fmean(count / k_total for count in solved)}
    if len(by_subset) > 1:
        metrics |= {f"eval/accuracy/{subset}": fmean(by_subset[subset]) for subset in sorted(by_subset)}
    metrics["eval/response_tokens"] = fmean(len(rollout.tokens) for group in groups for rollout in group)
    if k_total > 1:
        metrics[f"eval/mean@{k_total}"] = metrics["eval/accuracy"]
        for k in sorted({2**power for power in range(1, k_total.bit_length())} | {k_total}):
            metrics[f"eval/pass@{k}"] = fmean(pass_at_k(k_total, count, k) for count in solved)
    return metrics
