"""The plots of the report, as SVG text that takes its text and grid colours from the page (light or dark)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Written as colours that matplotlib accepts and nothing else uses, then exchanged for CSS in the SVG text.
TEXT, GRID = "#010203", "#040506"
CSS_COLOURS = {TEXT: "currentColor", GRID: "var(--grid)"}
SERIES = ("#3b82d6", "#e0803a", "#2fa37c", "#b36ac2", "#d4556a", "#8d9440", "#4fb3c8", "#8a8f98")  # on light and dark
MAX_POINTS = 400  # of a line; longer runs are averaged into this many bins, which keeps the page small
SMOOTH_FROM = 30  # points from which a running mean is drawn over the raw line

Metrics = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Plot:
    """One plot: `series` maps a metric key, or a prefix ending in "*", to its label ("" takes the key's own rest)."""

    title: str
    unit: str  # label of the y axis
    series: dict[str, str]
    log: bool = False
    stacked: bool = False
    from_zero: bool = False  # the axis starts at 0: for quantities whose size, not only change, is of interest
    level: str = ""  # key of a metric drawn as one horizontal line


PLOTS = (
    Plot("Reward", "reward (points), solved (share)", {"reward/mean": "mean reward", "reward/solved": "solved"}),
    Plot(
        "Held-out accuracy",
        "share of held-out prompts",
        {"eval/accuracy": "accuracy", "eval/accuracy/*": "", "eval/mean@*": "mean@", "eval/pass@*": "pass@"},
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
    Plot("Time per phase", "seconds per step", {"time/*": ""}, stacked=True, from_zero=True),
    Plot("Tokens", "tokens per step", {"tokens/rollout": "rollout", "tokens/train": "train"}, from_zero=True),
    Plot("Gradient norm", "L2 norm before clipping", {"grad_norm": "gradient norm"}, from_zero=True),
    Plot("Peak memory", "GB per rank", {"memory/peak_gb": "peak memory"}, from_zero=True),
)


def draw_plots(metrics: Metrics) -> list[tuple[str, str]]:
    """(title, SVG text) of each plot that has data."""
    drawn = []
    for index, plot in enumerate(PLOTS):
        figure = draw(plot, metrics)
        if figure is not None:
            drawn.append((plot.title, to_svg(figure, prefix=f"p{index}-")))
    return drawn


def draw(plot: Plot, metrics: Metrics) -> Figure | None:
    """The figure of one plot, or None where no step has any of its metrics."""
    lines = {}
    for pattern, label in plot.series.items():
        for key in _matching(pattern, metrics):
            steps, values = series_of(metrics, key)
            if np.isfinite(values).any():
                lines[label + key.removeprefix(pattern.rstrip("*")) if pattern.endswith("*") else label] = steps, values
    if not lines:
        return None
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.8, 3.1), layout="constrained")
        axes = figure.add_subplot()
        if plot.stacked:
            _draw_stack(axes, lines, metrics)
        else:
            _draw_lines(axes, lines)
        _draw_level(axes, plot.level, metrics)
        _style(axes, plot)
    return figure


def to_svg(figure: Figure, prefix: str) -> str:
    """SVG text for use inside a page; ids get a prefix, since several figures share the page's name space."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    for colour, css in CSS_COLOURS.items():
        svg = svg.replace(colour, css)
    return svg


def series_of(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the steps that have this metric."""
    points = [(line["step"], line[key]) for line in metrics if key in line]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)


def phase_keys(metrics: Metrics) -> list[str]:
    """The `time/...` keys of a step's phases, in order of first appearance.

    `time/step` is their whole, and `time/eval` comes after a step.
    """
    return [key for key in _matching("time/*", metrics) if key not in ("time/step", "time/eval")]


def _matching(pattern: str, metrics: Metrics) -> list[str]:
    keys = dict.fromkeys(key for line in metrics for key in line)
    if pattern.endswith("*"):
        return [key for key in keys if key.startswith(pattern[:-1])]
    return [pattern] if pattern in keys else []


def _draw_lines(axes, lines) -> None:
    for (label, (steps, values)), colour in zip(lines.items(), _colours(), strict=False):
        steps, values = _binned(steps, values)
        few = len(steps) < SMOOTH_FROM
        marker = "o" if len(steps) <= 12 else None
        axes.plot(
            steps,
            values,
            color=colour,
            linewidth=1.6 if few else 0.9,
            alpha=1.0 if few else 0.35,
            marker=marker,
            markersize=3.5,
            label=label if few else None,
        )
        if not few:
            axes.plot(steps, _running_mean(values, max(5, len(steps) // 20)), color=colour, linewidth=1.8, label=label)


def _draw_stack(axes, lines, metrics: Metrics) -> None:
    phases = [key.removeprefix("time/") for key in phase_keys(metrics)]
    rows = [line for line in metrics if any(f"time/{phase}" in line for phase in phases)]
    steps = np.array([line["step"] for line in rows], dtype=float)
    stack = {phase: np.array([line.get(f"time/{phase}", 0.0) for line in rows]) for phase in phases}
    if "step" in lines:
        whole = np.array([line.get("time/step", math.nan) for line in rows])
        stack["other"] = np.nan_to_num(whole - sum(stack.values())).clip(min=0.0)
    stack = {phase: values for phase, values in stack.items() if values.any()}
    binned = {phase: _binned(steps, np.nan_to_num(values)) for phase, values in stack.items()}
    labels = [phase.replace("_", " ") for phase in binned]
    values = [value for _, value in binned.values()]
    colours = [*SERIES[: len(labels) - 1], SERIES[-1]] if labels and labels[-1] == "other" else SERIES
    if len(rows) == 1:
        bottom = 0.0
        for label, value, colour in zip(labels, values, colours, strict=False):
            axes.bar(steps, value, bottom=bottom, color=colour, label=label, width=0.4)
            bottom = bottom + value
    elif values:
        axes.stackplot(next(iter(binned.values()))[0], values, labels=labels, colors=colours, alpha=0.9, linewidth=0)


def _draw_level(axes, key: str, metrics: Metrics) -> None:
    values = [line[key] for line in metrics if key in line and math.isfinite(line[key])]
    if values:
        axes.axhline(values[-1], color=SERIES[-1], linestyle="--", linewidth=1.4, label="teacher")


def _style(axes, plot: Plot) -> None:
    if plot.log and any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
        axes.set_yscale("log", nonpositive="mask")
    elif plot.from_zero:
        axes.set_ylim(bottom=0)
    axes.margins(x=0.01 if plot.stacked else 0.02)
    left, right = axes.get_xlim()
    if right - left < 1:  # a single step: ticks at fractions of a step mean nothing
        axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    axes.set_xlabel("step")
    axes.set_ylabel(plot.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.grid(True, axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, length=3, width=0.7)
    axes.tick_params(which="minor", length=0)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    axes.yaxis.offsetText.set_color(TEXT)
    for spine in axes.spines.values():
        spine.set(color=TEXT, linewidth=0.7)
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=4,
            frameon=False,
            labelcolor=TEXT,
            handlelength=1.3,
            columnspacing=1.3,
        )


def _binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most MAX_POINTS runs of neighbouring points; NaN points are left out of a mean."""
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


def _colours():
    while True:
        yield from SERIES
