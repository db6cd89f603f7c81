"""`report.html`: one self-contained page about a run. It opens from disk and needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from rlad_megatron.config import RunConfig
from rlad_megatron.config.recipe import to_yaml
from rlad_megatron.observe.metrics import read_metrics
from rlad_megatron.observe.plots import draw_plots
from rlad_megatron.observe.summary import Rows
from rlad_megatron.observe.timeline import TIMELINE_FILE

SAMPLES = 3  # rollouts shown from the first file and from the last
MAX_CHARACTERS = 4000  # of a prompt or response on the page


def write_report(config: RunConfig, summary_rows: Rows) -> Path:
    """Write the report of a run from its `metrics.jsonl` and `rollouts/*.jsonl`, if they exist, and return its path.

    Replaces an older report atomically.

    Args:
        config: the run's; the page shows it.
        summary_rows: (label, value) pairs from `observe.summary.summary_rows`.
    """
    metrics = read_metrics(config.run_dir)
    templates = PackageLoader("rlad_megatron", "observe")
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.j2").render(
        title=config.name,
        facts=_facts(config),
        summary=summary_rows,
        steps=int(metrics[-1]["step"]) if metrics else 0,
        plots=[(heading, Markup(svg)) for heading, svg in draw_plots(metrics)],
        timeline=TIMELINE_FILE if (config.run_dir / TIMELINE_FILE).exists() else "",
        samples=_sample_rollouts(config.run_dir / "rollouts"),
        config=to_yaml(config),
    )
    path = config.run_dir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _facts(config: RunConfig) -> list[tuple[str, str]]:
    """(name, value) pairs of the page's header."""
    objective, alpha = config.objective.name, f" (α = {config.objective.alpha})"
    facts = [("Run", config.name), ("Objective", objective + alpha if objective == "trrd" else objective)]
    for role, model in (("Student", config.student), ("Teacher", config.teacher)):
        if model.path:
            facts.append((role, f"{Path(model.path).name} ({model.precision}, {model.layout.text})"))
    return [*facts, ("Data", config.data.source)]


def _sample_rollouts(folder: Path) -> list[dict[str, Any]]:
    """A few rollouts from the first step and a few from the last, so that the change shows."""
    files = sorted(folder.glob("*.jsonl"))
    samples = []
    for file in dict.fromkeys([*files[:1], *files[-1:]]):
        whole_lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # the rest is empty or half-written
        for rollout in map(json.loads, whole_lines[:SAMPLES]):
            samples.append(rollout | {key: _shortened(rollout[key]) for key in ("prompt", "response")})
    return samples


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"
