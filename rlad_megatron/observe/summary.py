"""The key figures of a run, as rows for the report and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Table

from rlad_megatron.observe.plots import Metrics, phase_keys

Rows = Sequence[tuple[str, str]]


def summary_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """(label, value) rows: accuracy before, after and of the teacher; mean reward; time per phase.

    Rows whose metrics are missing are left out.
    """
    rows = []
    evaluated = [line for line in metrics if _has(line, "eval/accuracy")]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        rows.append((f"Held-out accuracy, before (step {first['step']})", f"{first['eval/accuracy']:.3f}"))
        if last is not first:
            rows.append((f"Held-out accuracy, after (step {last['step']})", f"{last['eval/accuracy']:.3f}"))
    if teacher := [line["eval/teacher_accuracy"] for line in metrics if _has(line, "eval/teacher_accuracy")]:
        rows.append(("Held-out accuracy, teacher", f"{teacher[-1]:.3f}"))
    if rewards := [line["reward/mean"] for line in metrics if _has(line, "reward/mean")]:
        tenth = max(1, len(rewards) // 10)
        rows.append(
            ("Mean reward, first and last tenth", f"{fmean(rewards[:tenth]):.3f} → {fmean(rewards[-tenth:]):.3f}")
        )
    return rows + _time_rows(metrics)


def summary_table(title: str, rows: Rows, console: Console) -> None:
    """Print the rows as a table."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for label, value in rows:
        table.add_row(label, value)
    console.print(table)


def _time_rows(metrics: Metrics) -> list[tuple[str, str]]:
    steps = [line for line in metrics if _has(line, "time/step")]
    if not steps:
        return []

    def mean_of(key: str) -> float:
        return fmean(line.get(key, 0.0) for line in steps)  # a step without this phase spent no time in it

    whole = mean_of("time/step")
    rows = [("Time per step, mean", f"{whole:.2f} s")]
    for key in phase_keys(metrics):
        label = key.removeprefix("time/").replace("_", " ")
        rows.append((f"– {label}", f"{mean_of(key):.2f} s, {mean_of(key) / whole:.0%}" if whole > 0 else "0 s"))
    return rows


def _has(line: dict[str, float], key: str) -> bool:
    return key in line and math.isfinite(line[key])
