"""Curves as matplotlib figures, and as SVG text that takes its text and grid colours from the page around it."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from rlad_megatron.observe.panels import Metrics, Panel, finite_values, matching, phase_seconds

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


def draw(panel: Panel, metrics: Metrics) -> Figure | None:
    """The figure of one plot; None if no step has any of its metrics."""
    lines = {}
    for pattern, label in panel.series.items():
        for key in matching(pattern, metrics):
            points_N2 = np.ma.masked_invalid([(line["step"], line[key]) for line in metrics if key in line])
            if points_N2[:, 1].count():
                lines[label + key.removeprefix(pattern.rstrip("*"))] = _binned(points_N2)
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.8, 3.1), layout="constrained")
        axes = figure.add_subplot()
        if panel.stacked:
            _draw_phases(axes, metrics)
        else:
            _draw_lines(axes, lines)
        if levels := finite_values(panel.level, metrics):
            axes.axhline(levels[-1], color=SERIES[-1], linestyle="--", linewidth=1.4, label="teacher")
        if panel.log and axes.dataLim.ymax > 0:
            axes.set_yscale("log", nonpositive="mask")
        elif panel.from_zero:
            axes.set_ylim(0, 1.05 * axes.dataLim.ymax or None)
        left, right = axes.get_xlim()
        if right - left < 1:  # a single step; ticks at fractions of a step mean nothing
            axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
        axes.locator_params(axis="x", integer=True, nbins=8)
        axes.set(xlabel="step", ylabel=panel.unit)
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
