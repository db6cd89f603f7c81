"""The key figures of a run, as rows for the report and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Column, Table

from rlad_megatron.observe.panels import Metrics, finite_values, phase_seconds

Rows = Sequence[tuple[str, str]]


def summary_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """(label, value) rows: accuracy before, after and of the teacher; mean reward; time per phase.

    Rows whose metrics are missing are left out.
    """
    rows = []
    evaluated = [line for line in metrics if finite_values("eval/accuracy", [line])]
    for when, line in zip(("before", "after"), evaluated[:1] + evaluated[1:][-1:], strict=False):
        rows.append((f"Held-out accuracy, {when} (step {line['step']})", f"{line['eval/accuracy']:.3f}"))
    if teacher := finite_values("eval/teacher_accuracy", metrics):
        rows.append(("Held-out accuracy, teacher", f"{teacher[-1]:.3f}"))
    if rewards := finite_values("reward/mean", metrics):
        tenth = max(1, len(rewards) // 10)
        first, last = fmean(rewards[:tenth]), fmean(rewards[-tenth:])
        rows.append(("Mean reward, first and last tenth", f"{first:.3f} → {last:.3f}"))
    if times := finite_values("time/step", metrics):
        rows.append(("Time per step, mean", f"{fmean(times):.2f} s"))
        for label, seconds in phase_seconds(metrics).items():
            rows.append((f"– {label}", f"{fmean(seconds):.2f} s, {fmean(seconds) / fmean(times):.0%}"))
    return rows


def summary_table(title: str, rows: Rows, console: Console) -> None:
    """Print the rows as a table."""
    table = Table(Column(style="bold"), Column(justify="right"), title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
