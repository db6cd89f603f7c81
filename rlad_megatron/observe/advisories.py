"""Advice in words from a run's figures. One pure function over the metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

from rlad_megatron.config import AHEAD, RunConfig
from rlad_megatron.config.agreement import FLOAT32_BOUND, HALF_PRECISION_FLOOR, engines_are_float32
from rlad_megatron.observe.panels import NO_PHASES, Metrics, finite_values

RECENT = 10  # steps whose mean is judged
SLOW_FACTOR, SLOW_FROM = 6.0, 5  # times the median; steps before a median says something
FLAT_GROUPS = 0.5  # shares
CUT_OFF = 0.25
CLAMPED = 0.9
NEAR_BOUND = 0.5  # of a bound that ends the run
MISMATCH_FACTOR = 3.0  # recent mean over the first one
MISMATCH_SHARE = 0.1  # of FLOAT32_BOUND; below it float32 rounds
DISK_SHARE, DISK_BYTES = 0.05, 100e9  # free space below both


@dataclass(frozen=True)
class Advisory:
    """One line. key: what it is about, the same as long as that lasts."""

    key: str
    text: str


def advisories(
    metrics: Metrics, config: RunConfig | None = None, disk: tuple[int, int] | None = None
) -> list[Advisory]:
    """What to look at, most urgent first.

    Args:
        metrics: lines of `metrics.jsonl`, in order; a missing or non-finite value is not judged.
        config: the run's, for the bounds of its probe and its mismatch; None: unknown, and neither is judged.
        disk: bytes free and in total, where the run folder is.
    """
    found = {
        "disk": _disk(disk),
        "probe": _probe(metrics, config),
        "mismatch": _mismatch(metrics, config),
        "slow": _slow(metrics),
        "flat": _flat(metrics),
        "cut": _recent(
            metrics,
            "rollout/cut_fraction",
            lambda share: share > CUT_OFF,
            "{:.0%} of the responses are cut off at rollout.sampling.max_tokens, and their reward is usually that of a "
            "wrong answer; raise it, or try objective.overlong_buffer",
        ),
        "clamp": _recent(
            metrics,
            "trrd/clamp_fraction",
            lambda share: share > CLAMPED,
            "the teacher gap is cut at objective.teacher_clamp at {:.0%} of the tokens: student and teacher are far "
            "apart; consider `rlad sft` first",
        ),
    }
    return [Advisory(key, text) for key, text in found.items() if text]


def _recent(metrics: Metrics, key: str, is_bad: Callable[[float], bool], text: str) -> str:
    """The text with the mean of a metric over the newest steps, if that is bad."""
    values = finite_values(key, metrics)[-RECENT:]
    if not values or not is_bad(fmean(values)):
        return ""
    return f"In the newest {_steps(len(values))} " + text.format(fmean(values))


def _slow(metrics: Metrics) -> str:
    steps = [line for line in metrics if finite_values("time/step", [line])]
    usual = median(line["time/step"] for line in steps) if len(steps) >= SLOW_FROM else 0.0
    slow = [line for line in steps if line["time/step"] >= SLOW_FACTOR * usual > 0]
    if not slow:
        return ""
    line, seconds = slow[-1], slow[-1]["time/step"]
    phases = {key: value for key, value in line.items() if key.startswith("time/") and key not in NO_PHASES}
    longest = max(phases, key=phases.__getitem__, default="")
    where = f", {phases[longest]:.1f} s of it in {longest.removeprefix('time/')}" if longest else ""
    earlier = f"; {len(slow) - 1} earlier step{'s were' if len(slow) > 2 else ' was'} slow too" if len(slow) > 1 else ""
    return (
        f"Step {line['step']:.0f} took {seconds:.1f} s, {seconds / usual:.1f} times the median of {usual:.1f} s{where}"
        f"{earlier}; look into logs/ for servers that restarted, and at the timeline"
    )


def _flat(metrics: Metrics) -> str:
    return _recent(
        metrics,
        "rollout/trained_fraction",
        lambda share: 1 - share > FLAT_GROUPS,
        "only {:.0%} of the responses were trained on; the others are in groups without variance, all solved or none, "
        "or were filtered: choose prompts of another difficulty, or try objective.dynamic_sampling",
    )


def _mismatch(metrics: Metrics, config: RunConfig | None) -> str:
    values = finite_values("mismatch/abs_mean", metrics)
    # Working ahead, the sampler's weights are older by design, and the figure moves with the speed of learning.
    if config is None or config.schedule == AHEAD or len(values) < 2 * RECENT:
        return ""
    first, recent = fmean(values[:RECENT]), fmean(values[-RECENT:])
    floor = MISMATCH_SHARE * FLOAT32_BOUND if engines_are_float32(config) else HALF_PRECISION_FLOOR["mean"]
    if recent < max(MISMATCH_FACTOR * first, floor):
        return ""
    return (
        f"The mismatch of sampler and trainer is rising: mismatch/abs_mean was {first:.1e} nats in the first "
        f"{_steps(RECENT)} and is {recent:.1e} in the newest; compare the engines' precision, or set "
        "objective.mismatch_correction"
    )


def _probe(metrics: Metrics, config: RunConfig | None) -> str:
    if config is None:
        return ""
    key = "sync/probe_abs_max" if engines_are_float32(config) else "sync/probe_abs_mean"
    values = finite_values(key, metrics)
    if not values:
        return ""
    bound = FLOAT32_BOUND
    if not engines_are_float32(config):  # its level is measured at the start; the first step's is the nearest known
        bound = config.rollout.mismatch_factor * max(values[0], HALF_PRECISION_FLOOR["mean"])
    largest = max(values[-RECENT:])
    if largest < NEAR_BOUND * bound:
        return ""
    return (
        f"The weight-sync probe is near the bound that ends the run: {key} reached {largest:.1e} nats of {bound:.1e}; "
        "compare precision and options of both engines"
    )


def _disk(disk: tuple[int, int] | None) -> str:
    if disk is None or disk[0] >= min(DISK_SHARE * disk[1], DISK_BYTES):
        return ""
    return (
        f"The disk of the run folder is nearly full: {disk[0] / 1e9:.1f} of {disk[1] / 1e9:.0f} GB are free; remove "
        "old runs, or lower checkpoint.keep"
    )


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"
