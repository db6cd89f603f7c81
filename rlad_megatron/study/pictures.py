"""The pictures of a comparison: SVG text that takes its text and grid colours from the page (light or dark)."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from rlad_megatron.study.summary import ACCURACY, AREA, Comparison

# Colours that nothing else uses, replaced by CSS in the SVG text.
TEXT, GRID = "#010203", "#040506"
CSS_COLOURS = {TEXT: "currentColor", GRID: "var(--grid)"}
COLOURS = ("#3b82d6", "#e0803a", "#2fa37c", "#b36ac2", "#d4556a", "#8d9440", "#4fb3c8")  # on light and dark
LINES = ("-", "--", ":")  # further arms take the same colours with the next of these
TEACHER_COLOUR = "#8a8f98"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 9,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.xmargin": 0.02,
    "grid.color": GRID,
    "text.color": TEXT,
    **{f"{axis}tick.color": TEXT for axis in "xy"},
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.3,
}
KINDS = {
    "positive_above": "A > 0, student above teacher",
    "positive_below": "A > 0, student below teacher",
    "negative_above": "A < 0, student above teacher",
    "negative_below": "A < 0, student below teacher",
}


@dataclass(frozen=True)
class Curves:
    """Panels of one metric each, by step. A name that ends in "*" is that of the metric with the largest number."""

    title: str
    unit: str
    panels: dict[str, str]  # metric -> title of its panel
    note: str = ""
    level: float | None = None  # a line across: what would be no effect


@dataclass(frozen=True)
class Picture:
    title: str
    svg: Markup
    note: str = ""
    wide: bool = False  # it needs the width of the page


CURVES = (
    Curves("Held-out accuracy", "share of held-out prompts", {"eval/accuracy": ""}),
    Curves("Pass@K", "share of held-out prompts", {"eval/pass@*": ""}),
    Curves("Reward", "points", {"reward/mean": ""}),
    Curves("Entropy", "nats per token", {"entropy/mean": ""}),
    Curves("Response length", "tokens in training", {"rollout/response_tokens": ""}),
    Curves(
        "Gap to the teacher",
        "log π student − log π teacher (nats)",
        {"trrd/teacher_gap_solved": "solved responses", "trrd/teacher_gap_unsolved": "unsolved responses"},
        level=0.0,
    ),
    Curves("KL to the start", "nats per token", {"reference/kl_mean": ""}),
    Curves("Tokens that the clip cuts", "share of such tokens", {f"trrd/clip_{kind}": KINDS[kind] for kind in KINDS}),
    Curves(
        "Gradient weight against GRPO's",
        "ratio",
        {f"trrd/weight_{kind}": KINDS[kind] for kind in KINDS},
        "1 is GRPO's weight of the same tokens.",
        level=1.0,
    ),
)


def draw_curves(comparison: Comparison) -> list[Picture]:
    """Each plot that has data: the mean over seeds, in a band from the lowest to the highest."""
    pictures = []
    for number, curves in enumerate(CURVES):
        figure = _draw(curves, comparison)
        if figure is not None:
            pictures.append(Picture(curves.title, _to_svg(figure, f"c{number}-"), curves.note, len(curves.panels) > 1))
    return pictures


def draw_differences(summary: dict[str, Any]) -> list[Picture]:
    """For each baseline and figure: each arm's mean difference, its interval, and each seed's."""
    pictures = []
    names = {ACCURACY: "final accuracy", AREA: "area under the accuracy curve"}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in summary["differences"]:
        if row["n"]:
            groups.setdefault((row["baseline"], row["figure"]), []).append(row)
    for number, ((baseline, name), rows) in enumerate(groups.items()):
        with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
            figure = Figure(figsize=(5.8, 0.9 + 0.36 * len(rows)), layout="constrained")
            axes = figure.add_subplot()
            axes.axvline(0, color=TEXT, linewidth=0.8)
            for place, row in enumerate(rows):
                colour = COLOURS[list(summary["arms"]).index(row["arm"]) % len(COLOURS)]
                if row["low"] is not None:
                    axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2.4)
                axes.plot(row["by_seed"], [place - 0.22] * row["n"], "|", color=colour, alpha=0.7, markersize=6)
                axes.plot(row["mean"], place, "o", color=colour, markersize=6)
            axes.set_yticks(range(len(rows)), [f"{_plain(row['arm'])} (n = {row['n']})" for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.6)
            axes.set_xlabel(f"difference in {names.get(name, name)}")
        title = f"{names.get(name, name).capitalize()}: arm − {baseline}"
        pictures.append(Picture(title, _to_svg(figure, f"d{number}-")))
    return pictures


def _draw(curves: Curves, comparison: Comparison) -> Figure | None:
    keys = {
        _largest(metric, comparison) if metric.endswith("*") else metric: curves.panels[metric]
        for metric in curves.panels
    }
    panels = [(key, title, found) for key, title in keys.items() if (found := _points(key, comparison))]
    if not panels:
        return None
    rows, columns = math.ceil(len(panels) / 2), min(len(panels), 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.8 * columns, 3.3 * rows if rows == 1 else 2.7 * rows), layout="constrained")
        drawn = figure.subplots(rows, columns, squeeze=False, sharey=len(panels) > 1).flatten()
        for axes in drawn[len(panels) :]:
            axes.remove()
        for axes, (key, title, arms) in zip(drawn, panels, strict=False):
            for arm, by_step in arms.items():
                _draw_arm(axes, arm, list(comparison.arms).index(arm), by_step)
            axes.set(title=title, xlabel="step")
            axes.locator_params(axis="x", integer=True, nbins=8)
            if curves.level is not None:
                axes.axhline(curves.level, color=TEXT, linewidth=0.8)
            if key in comparison.teacher:
                teacher = comparison.teacher[key]
                axes.axhline(teacher, color=TEACHER_COLOUR, linestyle="--", linewidth=1.4, label="teacher")
        for axes in drawn[::columns]:
            axes.set_ylabel(curves.unit)
        handles = {
            label: handle for axes in drawn for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if len(comparison.arms) > 1:
            figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3 * columns)
    return figure


def _draw_arm(axes, arm: str, place: int, by_step: dict[float, list[float]]) -> None:
    """The mean over seeds by step, in a band from the lowest to the highest."""
    steps = sorted(by_step)
    values = [by_step[step] for step in steps]
    colour, line = COLOURS[place % len(COLOURS)], LINES[place // len(COLOURS) % len(LINES)]
    marker = "o" if len(steps) <= 12 else None
    axes.plot(steps, list(map(np.mean, values)), color=colour, linestyle=line, marker=marker, label=_plain(arm))
    if max(map(len, values)) > 1:
        axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.16, linewidth=0)


def _plain(label: str) -> str:
    """Without matplotlib's mathematical mode: a label may hold a field's value."""
    return label.replace("$", r"\$")


def _points(key: str, comparison: Comparison) -> dict[str, dict[float, list[float]]]:
    """arm -> step -> the values of its seeds."""
    arms: dict[str, dict[float, list[float]]] = {}
    for arm, by_seed in comparison.arms.items():
        for metrics in by_seed.values():
            for line in metrics:
                if math.isfinite(line.get(key, math.nan)):
                    arms.setdefault(arm, {}).setdefault(line["step"], []).append(line[key])
    return arms


def _largest(pattern: str, comparison: Comparison) -> str:
    prefix = pattern.removesuffix("*")
    found = {
        key for by_seed in comparison.arms.values() for lines in by_seed.values() for line in lines for key in line
    }
    numbers = [int(key.removeprefix(prefix)) for key in found if key.startswith(prefix)]
    return f"{prefix}{max(numbers)}" if numbers else ""


def _to_svg(figure: Figure, prefix: str) -> Markup:
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
    return Markup(svg)
