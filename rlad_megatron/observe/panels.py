"""The curves of a run: which metrics are drawn together, and how. `rlad watch` and the report show all of them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Metrics = Sequence[dict[str, float]]

# Not phases of a step: the whole, what lies outside of it, and what is spent next to the phases.
NO_PHASES = ("time/step", "time/eval", "time/reward")


@dataclass(frozen=True)
class Panel:
    """Curves over steps. `series` maps a metric key to its label, or a prefix ending in "*" to that of its labels."""

    title: str
    unit: str  # label of the y axis
    series: dict[str, str]
    log: bool = False
    stacked: bool = False  # the phases of a step, whose sum is the step
    from_zero: bool = False  # the axis starts at 0, for quantities whose size matters and not only their change
    level: str = ""  # key of a metric drawn as a horizontal line, the teacher's


PANELS = (
    Panel(
        "Reward",
        "points; solved: share",
        {"reward/mean": "mean reward", "reward/solved": "solved", "reward/*": ""},
    ),
    Panel(
        "Held-out accuracy",
        "share of held-out prompts",
        {"eval/accuracy": "accuracy", "eval/accuracy/*": "", "eval/pass@*": "pass@"},
        from_zero=True,
        level="eval/teacher_accuracy",
    ),
    Panel("Loss", "nats", {"loss/policy": "policy loss"}),
    Panel("Teacher gap", "log π student − teacher (nats)", {"trrd/teacher_gap_mean": "teacher gap"}),
    Panel(
        "Clip and clamp",
        "share of trained tokens",
        {"ratio/clip_fraction": "ratio clipped", "trrd/clamp_fraction": "teacher gap clamped"},
        from_zero=True,
    ),
    Panel("Entropy", "nats per token", {"entropy/mean": "mean entropy"}, from_zero=True),
    Panel("KL to the starting student", "nats per token", {"reference/kl_mean": "k3 estimate"}, from_zero=True),
    Panel(
        "Sampler mismatch and weight-sync probe",
        "|log-prob difference| (nats)",
        {
            "mismatch/abs_mean": "mismatch, mean",
            "mismatch/abs_p99": "mismatch, p99",
            "mismatch/abs_max": "mismatch, max",
            "sync/probe_abs_max": "sync probe, max",
        },
        log=True,
    ),
    Panel("Gradient norm", "L2 norm before clipping", {"grad_norm": "gradient norm"}, from_zero=True),
    Panel(
        "Response length",
        "tokens",
        {"rollout/response_tokens": "training", "eval/response_tokens": "evaluation"},
        from_zero=True,
    ),
    Panel(
        "Cut off, and trained on",
        "share of responses",
        {"rollout/cut_fraction": "cut off at max_tokens", "rollout/trained_fraction": "trained on"},
        from_zero=True,
    ),
    Panel("Time per phase", "seconds per step", {"time/step": ""}, stacked=True, from_zero=True),
    Panel("Idle", "share of the step", {"idle/*": ""}, from_zero=True),
    Panel(
        "Throughput",
        "tokens per second",
        {"perf/tokens_per_s": "all", "perf/tokens_per_gpu_s": "per GPU (CPUs: per rank)"},
        from_zero=True,
    ),
    Panel(
        "MFU",
        "share of the peak",
        {"perf/mfu": "trainer's update", "perf/mfu_teacher": "teacher's pass"},
        from_zero=True,
    ),
    Panel("Slowest rank", "seconds / mean of ranks", {"slowest/*_over_mean": ""}),
    Panel("Weight sync", "seconds", {"sync/seconds": "push", "sync/pause_seconds": "servers paused"}, from_zero=True),
    Panel("Tokens", "tokens per step", {"tokens/rollout": "rollout", "tokens/train": "train"}, from_zero=True),
    Panel("Padding", "share of computed positions", {"tokens/padding_share": "padding"}, from_zero=True),
    Panel(
        "Policy lag",
        "updates",
        {"rollout/version_lag_mean": "mean", "rollout/version_lag_max": "largest"},
        from_zero=True,
    ),
    Panel("Memory of rank 0", "GB", {"memory/peak_gb": "peak", "memory/*_gb": ""}, from_zero=True),
)


def phase_seconds(metrics: Metrics) -> dict[str, np.ndarray]:
    """Seconds of each phase in every step, by the phase's label, in order of first appearance; "other" is last.

    A step without the phase spent no time in it.
    """
    keys = [key for key in matching("time/*", metrics) if key not in NO_PHASES]
    keys.sort(key="time/other".__eq__)
    steps = [line for line in metrics if "time/step" in line]
    return {
        key.removeprefix("time/").replace("_", " "): np.array([line.get(key, 0.0) for line in steps]) for key in keys
    }


def finite_values(key: str, metrics: Metrics) -> list[float]:
    return [line[key] for line in metrics if math.isfinite(line.get(key, math.nan))]


def matching(pattern: str, metrics: Metrics) -> list[str]:
    """The metrics' keys that match, in order of first appearance."""
    return fnmatch.filter(dict.fromkeys(key for line in metrics for key in line), pattern)
