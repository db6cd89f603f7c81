"""`report.html`: one self-contained page about a run, which opens from disk without a network."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup

from rlad_megatron.observe.metrics import read_metrics
from rlad_megatron.observe.plots import draw_plots
from rlad_megatron.observe.summary import Rows

REPORT_FILE = "report.html"
SAMPLES = 3  # rollouts shown from the first and from the last of the files
MAX_CHARACTERS = 4000  # of a prompt or response on the page


def write_report(run_dir: Path | str, title: str, summary_rows: Rows) -> Path:
    """Write the report of a run from what its folder holds, and return its path.

    Reads `metrics.jsonl`, `config.yaml` and `rollouts/*.jsonl` (objects with "prompt", "response", "reward", and
    where known "step", "solved", "subset"); whatever is missing leaves its part of the page out. An older report is
    replaced in one move.

    Args:
        run_dir: the run folder.
        title: heading of the page.
        summary_rows: (label, value) pairs, for example from `observe.summary.summary_rows`.
    """
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir)
    config_text = _read_text(run_dir / "config.yaml")
    template_text = resources.files("rlad_megatron.observe").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template_text)
    page = template.render(
        title=title,
        facts=_facts(config_text, run_dir),
        summary=summary_rows,
        steps=int(metrics[-1]["step"]) if metrics else 0,
        plots=[(heading, Markup(svg)) for heading, svg in draw_plots(metrics)],
        samples=_sample_rollouts(run_dir / "rollouts"),
        config=config_text,
    )
    path = run_dir / REPORT_FILE
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _facts(config_text: str, run_dir: Path) -> list[tuple[str, str]]:
    """What the header says of the run."""
    config = yaml.safe_load(config_text) or {}

    def field(path: str) -> Any:
        value: Any = config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    facts = [("Run", field("name") or run_dir.name)]
    objective = field("objective.name")
    if objective:
        alpha = f" (α = {field('objective.alpha')})" if objective == "trrd" else ""
        facts.append(("Objective", f"{objective}{alpha}"))
    for role in ("student", "teacher"):
        path = field(f"{role}.path")
        if path:
            layout = f"TP {field(f'{role}.layout.tensor_parallel')}, PP {field(f'{role}.layout.pipeline_parallel')}"
            facts.append((role.capitalize(), f"{Path(path).name} ({field(f'{role}.precision')}, {layout})"))
    if field("data.source"):
        facts.append(("Data", str(field("data.source"))))
    return facts


def _sample_rollouts(folder: Path) -> list[dict[str, Any]]:
    """A few rollouts from the first file and a few from the last, so that the change shows."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        return []
    first, last = _read_rollouts(files[0]), _read_rollouts(files[-1])
    if len(files) > 1:
        return first[:SAMPLES] + last[:SAMPLES]
    return first if len(first) <= 2 * SAMPLES else first[:SAMPLES] + first[-SAMPLES:]


def _read_rollouts(path: Path) -> list[dict[str, Any]]:
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the rest may be half-written
    rollouts = [json.loads(line) for line in whole_lines]
    for rollout in rollouts:
        for key in ("prompt", "response"):
            rollout[key] = _shortened(str(rollout.get(key, "")))
    return rollouts


def _shortened(text: str) -> str:
    half = MAX_CHARACTERS // 2
    return (
        text
        if len(text) <= MAX_CHARACTERS
        else f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"
    )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
