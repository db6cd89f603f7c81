"""How often an interval over a few seeds covers 0 when two arms are equal: Student's t and the percentile bootstrap.

    python benchmarks/intervals.py

Each arm's accuracy at a seed is binomial over the held-out puzzles, around a true accuracy that differs by seed.
"""

import numpy as np

from rlad_megatron.study.summary import interval

STUDIES, PUZZLES, ACCURACY, BETWEEN_SEEDS = 4000, 512, 0.7, 0.03
RESAMPLES = 2000


def differences(seeds: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [STUDIES, seeds]: one arm minus the other, in paired runs."""
    truth = np.clip(rng.normal(ACCURACY, BETWEEN_SEEDS, (2, STUDIES, seeds)), 0, 1)
    mine, other = rng.binomial(PUZZLES, truth) / PUZZLES
    return mine - other


def bootstrap_covers(found: np.ndarray, rng: np.random.Generator) -> bool:
    means = rng.choice(found, (RESAMPLES, len(found))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return bool(low <= 0 <= high)


def t_covers(found: np.ndarray) -> bool:
    ends = interval(list(found))
    return ends["low"] <= 0 <= ends["high"]


def main() -> None:
    rng = np.random.default_rng(0)
    print("| seeds | Student's t covers 0 in | the percentile bootstrap in |")
    print("| --- | --- | --- |")
    for seeds in (3, 5, 10):
        studies = differences(seeds, rng)
        t = np.mean([t_covers(found) for found in studies])
        bootstrap = np.mean([bootstrap_covers(found, rng) for found in studies])
        print(f"| {seeds} | {t:.1%} | {bootstrap:.1%} |")


if __name__ == "__main__":
    main()
