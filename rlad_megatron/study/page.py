"""The pages of a comparison: HTML that needs no network, and Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from rlad_megatron.study.pictures import draw_curves, draw_differences
from rlad_megatron.study.summary import ACCURACY, AREA, Comparison, summarise
from rlad_megatron.trainer.run_state import write_whole

Table = tuple[list[str], list[list[str]]]  # head and rows


def write_page(comparison: Comparison, summary: dict[str, Any], file: Path) -> None:
    """The HTML page of a comparison and its summary. Replaces an older one atomically."""
    environment = Environment(
        loader=PackageLoader("rlad_megatron", "study"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("study.html.j2").render(
        summary=summary,
        arms=arms_table(summary),
        differences=differences_table(summary),
        curves=draw_curves(comparison),
        forest=draw_differences(summary),
        tuned=tuned_lines(summary),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, page)


def write_results(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Write report.html, summary.json and summary.md into a folder; returns the summary."""
    summary = summarise(comparison)
    write_page(comparison, summary, folder / "report.html")
    write_whole(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "summary.md", markdown(summary))
    return summary


def markdown(summary: dict[str, Any]) -> str:
    """The summary for people, without pictures."""
    parts = [f"# {summary['title']}"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in summary["facts"].items()))
    parts.append(_as_markdown(arms_table(summary)))
    if summary["differences"]:
        parts += ["## Differences, paired by seed", _as_markdown(differences_table(summary)), summary["method"]]
    if summary["tuned"]:
        parts += ["## Chosen variants", "\n".join(f"- {line}" for line in tuned_lines(summary))]
    if summary["not_run"]:
        missing = "\n".join(f"- {row['task']}: {row['why']}" for row in summary["not_run"])
        parts += ["## Not run", missing]
    return "\n\n".join(part for part in parts if part) + "\n"


def arms_table(summary: dict[str, Any]) -> Table:
    """Each arm over its seeds, and the teacher."""
    arms = summary["arms"].values()
    passes = sorted({key for arm in arms for key in arm if key.startswith("pass@")}, key=lambda key: int(key[5:]))[-1:]
    head = ["arm", "seeds", "final accuracy (Mean@K)", *(key.capitalize() for key in passes), "area under the curve"]
    rows = [
        [
            name,
            str(len(arm["seeds"])),
            *(_with_interval(arm.get(key)) for key in (ACCURACY, *passes, AREA)),
            *(_amount(arm.get(key)) for key in ("seconds", "tokens_rollout", "tokens_train")),
        ]
        for name, arm in summary["arms"].items()
    ]
    if teacher := summary["teacher"]:
        values = [_number(teacher.get(f"eval/{key}")) for key in (ACCURACY, *passes)]
        rows.append(["teacher", "", *values, "", "", "", ""])
    return [*head, "seconds of steps", "tokens sampled", "tokens trained"], rows


def differences_table(summary: dict[str, Any]) -> Table:
    """Each difference with its interval and the number of pairs."""
    head = ["arm", "minus", "figure", "mean difference", "95% interval", "pairs", "excludes 0"]
    rows = [
        [
            *(row[key] for key in ("arm", "baseline", "figure")),
            _number(row["mean"], "+.3f"),
            _ends(row),
            str(row["n"]),
            "" if row["low"] is None else "yes" if row["excludes_0"] else "no",
        ]
        for row in summary["differences"]
    ]
    return head, rows


def tuned_lines(summary: dict[str, Any]) -> list[str]:
    """What was chosen for each arm with variants, in words."""
    lines = []
    for arm, tuned in summary["tuned"].items():
        found = ", ".join(f"{name} {value:.3f}" for name, value in tuned["accuracies"].items()) or "none has finished"
        chosen = f"{tuned['chosen']} was chosen" if tuned["chosen"] else "nothing is chosen yet"
        lines.append(f"{arm}: {chosen}, by final accuracy at seed {tuned['seed']}, which does not count: {found}")
    return lines


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _ends(found: dict[str, Any]) -> str:
    return "" if found["low"] is None else f"{found['low']:+.3f} to {found['high']:+.3f}"


def _with_interval(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    ends = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return _number(found["mean"]) + ends


def _amount(found: dict[str, Any] | None) -> str:
    return f"{found['mean']:,.0f}" if found else ""


def _as_markdown(table: Table) -> str:
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
