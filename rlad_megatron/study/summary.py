"""The figures of a comparison: each arm over its seeds, and arms against a baseline, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import integrate, stats

from rlad_megatron.observe.panels import finite_values
from rlad_megatron.study.progress import Metrics, final

LEVEL = 0.95
FEWEST = 3  # values for an interval: two can be equal by chance, and then it would have no width
ACCURACY, AREA = "accuracy", "area"
METHOD = (
    "Intervals are Student's t at 95% over the seeds, from 3 seeds on; differences are taken between runs of the same "
    "seed, which in a study have the same prompts in the same order. A bootstrap over so few seeds is too narrow. They "
    "speak of other seeds on the same held-out prompts, and each stands by itself: of 20 comparisons of equal arms one "
    "is expected to exclude 0."
)


@dataclass(frozen=True)
class Comparison:
    """Runs of several arms."""

    title: str
    arms: dict[str, dict[int, Metrics]]  # arm -> seed -> metrics of a run that counts
    baselines: Sequence[str]  # arms from which differences are taken
    teacher: dict[str, float] = field(default_factory=dict)  # metrics of its evaluation
    facts: Sequence[tuple[str, str]] = ()  # about the whole, for people
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)  # arm -> seed, accuracy of each variant, the chosen
    not_run: Sequence[tuple[str, str]] = ()  # what is missing, and why


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, number, and low and high end of Student's t interval at 95%; the ends are None below FEWEST values.

    It assumes that values are about normal. With 3 to 5 of them it covers the mean in 95% of cases, where a percentile
    bootstrap covers it in 78% to 83% (docs/studies.md).
    """
    found: dict[str, float | int | None] = {"mean": None, "low": None, "high": None, "n": len(values)}
    if values:
        found["mean"] = mean = math.fsum(values) / len(values)
        if len(values) >= FEWEST:
            spread = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
            found |= {"low": mean - spread, "high": mean + spread}
    return found


def area(metrics: Metrics) -> float | None:
    """Held-out accuracy averaged over the steps between the first evaluation and the last, by the trapezoidal rule."""
    points = [(line["step"], line["eval/accuracy"]) for line in metrics if final([line])]
    if len(points) < 2:
        return None
    steps, values = zip(*points, strict=True)
    return float(integrate.trapezoid(values, steps) / (steps[-1] - steps[0]))


def run_figures(metrics: Metrics) -> dict[str, float]:
    """The figures of one run: accuracy and Pass@k at the end, area under the curve, seconds and tokens.

    Figures that it lacks are left out; accuracy is Mean@K.
    """
    last = final(metrics)
    figures: dict[str, float | None] = {ACCURACY: last.get("eval/accuracy"), AREA: area(metrics)}
    figures |= {name.removeprefix("eval/"): last[name] for name in last if name.startswith("eval/pass@")}
    for name, key in (("seconds", "time/step"), ("tokens_rollout", "tokens/rollout"), ("tokens_train", "tokens/train")):
        values = finite_values(key, metrics)
        figures[name] = math.fsum(values) if values else None
    return {name: value for name, value in figures.items() if value is not None}


def summarise(comparison: Comparison) -> dict[str, Any]:
    """Everything that the pages show, as JSON: `summary.json` of a study."""
    runs = {
        arm: {seed: run_figures(metrics) for seed, metrics in by_seed.items()}
        for arm, by_seed in comparison.arms.items()
    }
    arms = {}
    for arm, by_seed in runs.items():
        names = dict.fromkeys(name for figures in by_seed.values() for name in figures)
        over = {name: [figures[name] for figures in by_seed.values() if name in figures] for name in names}
        arms[arm] = {
            "seeds": list(by_seed),
            "runs": {str(seed): figures for seed, figures in by_seed.items()},
            **{name: interval(values) for name, values in over.items()},
        }
    return {
        "title": comparison.title,
        "facts": dict(comparison.facts),
        "method": METHOD,
        "teacher": comparison.teacher,
        "arms": arms,
        "differences": [
            {"arm": arm, "baseline": baseline, "figure": name, **_paired(runs[arm], runs[baseline], name)}
            for baseline in comparison.baselines
            for arm in comparison.arms
            if arm != baseline
            for name in _compared(runs)
        ],
        "tuned": comparison.tuned,
        "not_run": [{"task": task, "why": why} for task, why in comparison.not_run],
    }


def _compared(runs: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """The figures whose differences are of interest: accuracy, area, and Pass@k for the largest k."""
    names = {name for by_seed in runs.values() for figures in by_seed.values() for name in figures}
    passes = sorted((name for name in names if name.startswith("pass@")), key=lambda name: int(name[5:]))
    return [name for name in (ACCURACY, AREA, *passes[-1:]) if name in names]


def _paired(mine: dict[int, dict[str, float]], other: dict[int, dict[str, float]], name: str) -> dict[str, Any]:
    seeds = [seed for seed in mine if name in mine[seed] and name in other.get(seed, {})]
    differences = [mine[seed][name] - other[seed][name] for seed in seeds]
    found = interval(differences)
    resolved = found["low"] is not None and found["high"] is not None and (found["low"] > 0 or found["high"] < 0)
    return {**found, "seeds": seeds, "by_seed": differences, "excludes_0": resolved}
