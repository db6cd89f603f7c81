"""The few figures that a run comes down to: rows for the report and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rlad_megatron.observe.plots import phase_keys, series_of

Rows = Sequence[tuple[str, str]]


def summary_rows(metrics: Sequence[dict[str, float]], teacher_accuracy: float | None = None) -> list[tuple[str, str]]:
    """(label, value) rows from what a run has measured: accuracy before, after and of the teacher; time per phase.

    Rows whose metrics are missing are left out. `teacher_accuracy` falls back on the metric `eval/teacher_accuracy`.
    """
    rows = []
    evaluated = [line for line in metrics if _has(line, "eval/accuracy")]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        rows.append((f"Held-out accuracy, before (step {first['step']})", f"{first['eval/accuracy']:.3f}"))
        if last is not first:
            rows.append((f"Held-out accuracy, after (step {last['step']})", f"{last['eval/accuracy']:.3f}"))
    if teacher_accuracy is None:
        teacher_accuracy = next(
            (line["eval/teacher_accuracy"] for line in reversed(metrics) if _has(line, "eval/teacher_accuracy")), None
        )
    if teacher_accuracy is not None:
        rows.append(("Held-out accuracy, teacher", f"{teacher_accuracy:.3f}"))
    rewards = [line["reward/mean"] for line in metrics if _has(line, "reward/mean")]
    if rewards:
        tenth = max(1, len(rewards) // 10)
        rows.append(
            ("Mean reward, first and last tenth", f"{_mean(rewards[:tenth]):.3f} → {_mean(rewards[-tenth:]):.3f}")
        )
    return rows + _time_rows(metrics)


def summary_table(title: str, rows: Rows, console: Console | None = None) -> None:
    """Print the rows as a table on the terminal."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for label, value in rows:
        table.add_row(label, value)
    (console or Console()).print(table)


def _time_rows(metrics: Sequence[dict[str, float]]) -> list[tuple[str, str]]:
    def mean_of(key: str) -> float:
        # A phase that some steps do not have took no time in them.
        values = [line.get(key, 0.0) for line in metrics if _has(line, "time/step")]
        return _mean([value for value in values if math.isfinite(value)])

    if not series_of(metrics, "time/step")[0].size:
        return []
    step = mean_of("time/step")
    rows = [("Time per step, mean", f"{step:.2f} s")]
    for key in phase_keys(metrics):
        label = key.removeprefix("time/").replace("_", " ")
        rows.append((f"– {label}", f"{mean_of(key):.2f} s, {mean_of(key) / step:.0%}" if step > 0 else "0 s"))
    return rows


def _has(line: dict[str, float], key: str) -> bool:
    return key in line and math.isfinite(line[key])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
