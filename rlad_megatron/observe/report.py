"""`report.html`: one self-contained page about a run. It opens from disk and needs no network."""

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
SAMPLES = 3  # rollouts shown from the first file and from the last
MAX_CHARACTERS = 4000  # of a prompt or response on the page


def write_report(run_dir: Path | str, title: str, summary_rows: Rows) -> Path:
    """Write the report of a run from the files in its folder, and return its path.

    Reads `metrics.jsonl`, `config.yaml` and `rollouts/*.jsonl`; a missing file leaves out its part of the page.
    Replaces an older report atomically.

    Args:
        run_dir: the run folder.
        title: heading of the page.
        summary_rows: (label, value) pairs from `observe.summary.summary_rows`.
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
    """(name, value) pairs of the page's header."""
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
    """A few rollouts from the first step and a few from the last, so that the change shows."""
    files = sorted(folder.glob("*.jsonl"))
    return [rollout for file in dict.fromkeys([*files[:1], *files[-1:]]) for rollout in _read_rollouts(file)[:SAMPLES]]


def _read_rollouts(path: Path) -> list[dict[str, Any]]:
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the rest is empty or half-written
    rollouts = [json.loads(line) for line in whole_lines]
    for rollout in rollouts:
        rollout |= {key: _shortened(rollout[key]) for key in ("prompt", "response")}
    return rollouts


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
