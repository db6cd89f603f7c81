"""The plots of the report: SVG text that takes its text and grid colours from the page (light or dark)."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    **{f"{axis}tick.color": TEXT for axis in "xy"},
    **{f"{axis}tick.major.size": 3.0 for axis in "xy"},
    **{f"{axis}tick.major.width": 0.7 for axis in "xy"},
    **{f"{axis}tick.minor.size": 0.0 for axis in "xy"},
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
            "mismatch/abs_max": "mismatch, max",
            "sync/probe_abs_max": "sync probe, max",
        },
        log=True,
    ),
    Plot("Time per phase", "seconds per step", {"time/step": ""}, stacked=True, from_zero=True),
    Plot("Tokens", "tokens per step", {"tokens/rollout": "rollout", "tokens/train": "train"}, from_zero=True),
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
            points = [(line["step"], line[key]) for line in metrics if key in line]
            steps, values = np.array(points, dtype=float).T
            if np.isfinite(values).any():
                lines[label + key.removeprefix(pattern.rstrip("*")) if pattern.endswith("*") else label] = steps, values
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.8, 3.1), layout="constrained")
        axes = figure.add_subplot()
        if plot.stacked:
            _draw_stack(axes, metrics)
        else:
            _draw_lines(axes, lines)
        levels = [line[plot.level] for line in metrics if math.isfinite(line.get(plot.level, math.nan))]
        if levels:
            axes.axhline(levels[-1], color=SERIES[-1], linestyle="--", linewidth=1.4, label="teacher")
        _finish(axes, plot)
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


def phase_keys(metrics: Metrics) -> list[str]:
    """The `time/...` keys of a step's phases, in order of first appearance.

    Not `time/step`, which is their total, and not `time/eval`, which is spent outside of steps.
    """
    return [key for key in _matching("time/*", metrics) if key not in ("time/step", "time/eval")]


def _matching(pattern: str, metrics: Metrics) -> list[str]:
    keys = dict.fromkeys(key for line in metrics for key in line)
    if pattern.endswith("*"):
        return [key for key in keys if key.startswith(pattern[:-1])]
    return [pattern] if pattern in keys else []


def _draw_lines(axes, lines) -> None:
    for (label, (steps, values)), colour in zip(lines.items(), itertools.cycle(SERIES), strict=False):
        steps, values = _binned(steps, values)
        if len(steps) < SMOOTH_FROM:
            marker = "o" if len(steps) <= 12 else None
            axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=label)
        else:
            axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.35)
            axes.plot(steps, _running_mean(values, max(5, len(steps) // 20)), color=colour, linewidth=1.8, label=label)


def _draw_stack(axes, metrics: Metrics) -> None:
    """Seconds of each phase of a step, and of the rest of the step."""
    rows = [line for line in metrics if "time/step" in line]
    steps, whole = (np.array([line[key] for line in rows], dtype=float) for key in ("step", "time/step"))
    stack = {key: np.array([line.get(key, 0.0) for line in rows]) for key in phase_keys(metrics)}
    stack["time/other" if stack else "time/step"] = np.clip(whole - sum(stack.values()), 0.0, None)
    stack = {key: values for key, values in stack.items() if values.any()}
    labels = [key.removeprefix("time/").replace("_", " ") for key in stack]
    colours = [SERIES[-1] if key == "time/other" else colour for key, colour in zip(stack, itertools.cycle(SERIES))]
    binned = [_binned(steps, values)[1] for values in stack.values()]
    if len(rows) == 1:
        bottoms = np.cumsum([0.0, *(value.item() for value in binned)])
        for label, value, bottom, colour in zip(labels, binned, bottoms, colours, strict=False):
            axes.bar(steps, value, bottom=bottom, color=colour, label=label, width=0.4)
    elif binned:
        axes.stackplot(_binned(steps, whole)[0], binned, labels=labels, colors=colours, alpha=0.9, linewidth=0)


def _finish(axes, plot: Plot) -> None:
    if plot.log and any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
        axes.set_yscale("log", nonpositive="mask")
    elif plot.from_zero:
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax or None)
    axes.margins(x=0.01 if plot.stacked else 0.02)
    left, right = axes.get_xlim()
    if right - left < 1:  # a single step; ticks at fractions of a step mean nothing
        axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    axes.set_xlabel("step")
    axes.set_ylabel(plot.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4)


def _binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most MAX_POINTS bins of neighbouring points, without NaN points."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    step_bins, value_bins = np.array_split(steps, MAX_POINTS), np.array_split(values, MAX_POINTS)
    return np.array([b.mean() for b in step_bins]), np.array([_mean(b) for b in value_bins])


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    half = window // 2
    return np.array([_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan
