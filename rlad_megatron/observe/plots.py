"""The plots of the report: SVG text that takes its text and grid colours from the page (light or dark)."""

from __future__ import annotations

import fnmatch
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

# Colours that nothing else uses, replaced by CSS in the SVG text.
TEXT, GRID = "#010203", "#040506"
CSS_COLOURS = {TEXT: "currentColor", GRID: "var(--grid)"}
SERIES = ("#3b82d6", "#e0803a", "#2fa37c", "#b36ac2", "#d4556a", "#8d9440", "#4fb3c8", "#8a8f98")  # on light and dark
MAX_POINTS = 400  # per line; longer runs are averaged into this many bins to keep the page small
SMOOTH_FROM = 30  # with this many points or more, a running mean is drawn over the raw line
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.xmargin": 0.02,
    "axes.prop_cycle": cycler(color=SERIES),
    "grid.color": GRID,
    **{f"{axis}tick.color": TEXT for axis in "xy"},
    **{f"{axis}tick.minor.size": 0.0 for axis in "xy"},
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.labelcolor": TEXT,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.3,
}

Metrics = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Plot:
    """One plot. `series` maps a metric key to its label, or a prefix ending in "*" to the prefix of its labels."""

    title: str
    unit: str  # label of the y axis
    series: dict[str, str]
    log: bool = False
    stacked: bool = False
    from_zero: bool = False  # the axis starts at 0, for quantities whose size matters and not only their change
    level: str = ""  # key of a metric drawn as a horizontal line


PLOTS = (
    Plot("Reward", "reward (points), solved (share)", {"reward/mean": "mean reward", "reward/solved": "solved"}),
    Plot(
        "Held-out accuracy",
        "share of held-out prompts",
        {"eval/accuracy": "accuracy", "eval/accuracy/*": "", "eval/pass@*": "pass@"},
        from_zero=True,
        level="eval/teacher_accuracy",
    ),
    Plot("Loss", "loss (nats)", {"loss/policy": "policy loss"}),
    Plot(
        "Clip and clamp",
        "share of trained tokens",
        {"ratio/clip_fraction": "ratio clipped", "trrd/clamp_fraction": "teacher gap clamped"},
        from_zero=True,
    ),
    Plot("Teacher gap", "mean log π student − log π teacher (nats)", {"trrd/teacher_gap_mean": "teacher gap"}),
    Plot(
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
    Plot("Time per phase", "seconds per step", {"time/step": ""}, stacked=True, from_zero=True),
    Plot(
        "Weight sync",
        "seconds",
        {"sync/seconds": "push", "sync/pause_seconds": "servers paused"},
        from_zero=True,
    ),
    Plot("Idle", "share of the step", {"idle/*": ""}, from_zero=True),
    Plot("Tokens", "tokens per step", {"tokens/rollout": "rollout", "tokens/train": "train"}, from_zero=True),
    Plot("Padding", "share of computed positions", {"tokens/padding_share": "padding"}, from_zero=True),
    Plot("Gradient norm", "L2 norm before clipping", {"grad_norm": "gradient norm"}, from_zero=True),
    Plot("Peak memory", "GB per rank", {"memory/peak_gb": "peak memory"}, from_zero=True),
)


def draw_plots(metrics: Metrics) -> list[tuple[str, str]]:
    """(title, SVG text) of each plot that has data."""
    figures = [(plot.title, draw(plot, metrics)) for plot in PLOTS]
    return [(title, to_svg(figure, f"p{i}-")) for i, (title, figure) in enumerate(figures) if figure is not None]


def draw(plot: Plot, metrics: Metrics) -> Figure | None:
    """The figure of one plot; None if no step has any of its metrics."""
    lines = {}
    for pattern, label in plot.series.items():
        for key in _matching(pattern, metrics):
            points_N2 = np.ma.masked_invalid([(line["step"], line[key]) for line in metrics if key in line])
            if points_N2[:, 1].count():
                lines[label + key.removeprefix(pattern.rstrip("*"))] = _binned(points_N2)
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.8, 3.1), layout="constrained")
        axes = figure.add_subplot()
        if plot.stacked:
            _draw_phases(axes, metrics)
        else:
            _draw_lines(axes, lines)
        if levels := finite_values(plot.level, metrics):
            axes.axhline(levels[-1], color=SERIES[-1], linestyle="--", linewidth=1.4, label="teacher")
        if plot.log and axes.dataLim.ymax > 0:
            axes.set_yscale("log", nonpositive="mask")
        elif plot.from_zero:
            axes.set_ylim(0, 1.05 * axes.dataLim.ymax or None)
        left, right = axes.get_xlim()
        if right - left < 1:  # a single step; ticks at fractions of a step mean nothing
            axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
        axes.locator_params(axis="x", integer=True, nbins=8)
        axes.set(xlabel="step", ylabel=plot.unit)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3)
    return figure


def to_svg(figure: Figure, prefix: str) -> str:
    """SVG text to embed in a page. Ids get the prefix, because all figures of a page share its ids."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for colour, css in CSS_COLOURS.items():
        svg = svg.replace(colour, css)
    return svg


def phase_seconds(metrics: Metrics) -> dict[str, np.ndarray]:
    """Seconds of each phase in every step, by the phase's label, in order of first appearance; "other" is last.

    A step without the phase spent no time in it. Not `time/step`, which is the total, `time/eval`, which is spent
    outside of steps, and `time/reward`, which is spent next to the phases.
    """
    keys = [key for key in _matching("time/*", metrics) if key not in ("time/step", "time/eval", "time/reward")]
    keys.sort(key="time/other".__eq__)
    steps = [line for line in metrics if "time/step" in line]
    return {
        key.removeprefix("time/").replace("_", " "): np.array([line.get(key, 0.0) for line in steps]) for key in keys
    }


def finite_values(key: str, metrics: Metrics) -> list[float]:
    return [line[key] for line in metrics if math.isfinite(line.get(key, math.nan))]


def _matching(pattern: str, metrics: Metrics) -> list[str]:
    return fnmatch.filter(dict.fromkeys(key for line in metrics for key in line), pattern)


def _draw_lines(axes, lines: dict[str, np.ma.MaskedArray]) -> None:
    for label, points_N2 in lines.items():
        steps, values = points_N2.T
        (line,) = axes.plot(steps, values, linewidth=1.6, marker="o" if len(steps) <= 12 else None, label=label)
        if len(steps) >= SMOOTH_FROM:
            line.set(linewidth=0.9, alpha=0.35, label=None)
            half = max(5, len(steps) // 20) // 2
            means = np.ma.stack([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
            axes.plot(steps, means, color=line.get_color(), linewidth=1.8, label=label)


def _draw_phases(axes, metrics: Metrics) -> None:
    """Seconds of each phase of a step on top of each other. They add up to the step (`PhaseTimers`)."""
    steps = np.array([line["step"] for line in metrics if "time/step" in line], dtype=float)
    stack = {label: seconds for label, seconds in phase_seconds(metrics).items() if seconds.any()}
    steps, *seconds = _binned(np.ma.stack([steps, *stack.values()], axis=1)).T
    if len(steps) == 1:  # a bar
        steps, seconds = steps[0] + np.array([-0.2, 0.2]), np.repeat(seconds, 2, axis=1)
    colours = [*SERIES[: len(stack) - 1], SERIES[-1]]
    axes.stackplot(steps, seconds, labels=list(stack), colors=colours, alpha=0.9, linewidth=0)


def _binned(points: np.ma.MaskedArray) -> np.ma.MaskedArray:
    """The means of at most MAX_POINTS bins of neighbouring rows, over the values that are not masked."""
    if len(points) <= MAX_POINTS:
        return points
    return np.ma.stack([rows.mean(axis=0) for rows in np.array_split(points, MAX_POINTS)])
