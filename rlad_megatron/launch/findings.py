"""What `rlad doctor` finds, and how it prints that. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from rich.console import Console
from rich.table import Table

MARKS = {"fine": "ok", "note": "note", "wrong": "WRONG"}


@dataclass(frozen=True)
class Finding:
    """One line."""

    kind: Literal["fine", "note", "wrong"]  # note: some runs do not work, or are slow
    what: str
    found: str
    remedy: str = ""


fine, note, wrong = (partial(Finding, kind) for kind in ("fine", "note", "wrong"))


def print_findings(findings: Sequence[Finding], console: Console) -> int:
    """Print a table and a last line; returns the exit code: 1 if something is wrong."""
    table = Table("", "What", "Found", "What to do", show_lines=False)
    for finding in findings:
        style = {"fine": None, "note": "yellow", "wrong": "bold red"}[finding.kind]
        table.add_row(MARKS[finding.kind], finding.what, finding.found, finding.remedy, style=style)
    console.print(table)
    count = sum(finding.kind == "wrong" for finding in findings)
    console.print(f"{count} to fix before a run." if count else "Nothing is wrong.")
    return 1 if count else 0
