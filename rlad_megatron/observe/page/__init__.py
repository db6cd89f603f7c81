"""The page about a run, the same for the report and for `rlad watch`: page.html.j2, its style and its scripts.

Scripts are plain files that share one scope, in the order of SCRIPTS: a page on disk cannot import modules. plotly.js,
which the Python package plotly brings, draws the curves.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from rlad_megatron.config import RunConfig
from rlad_megatron.config.recipe import to_yaml
from rlad_megatron.observe.panels import NO_PHASES, PANELS

STYLE, PLOTLY = "page.css", "plotly.min.js"
SCRIPTS = (PLOTLY, "source.js", "curves.js", "tokens.js", "rollouts.js", "page.js")
ASSETS = (STYLE, *SCRIPTS)
# Nothing comes from another host. plotly.js adds rules of style to the page.
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; style-src 'self' 'unsafe-inline'"
)


@cache
def asset(name: str) -> str:
    """The text of one of ASSETS."""
    return (files("plotly") / "package_data" / name if name == PLOTLY else files(__package__) / name).read_text("utf-8")


def live_policy() -> str:
    """The Content-Security-Policy of the page that a server answers with, and of all its answers."""
    return f"{POLICY}; script-src 'self'; connect-src 'self'; frame-ancestors 'none'"


def live_page(title: str) -> str:
    """The page that asks the server it comes from what is new."""
    return _render(title, {"live": True}, frozen=False)


def frozen_page(title: str, answer: dict[str, Any], rollouts: list[dict[str, Any]]) -> str:
    """One file with everything in it.

    Args:
        answer: what a server would answer: `facts` and `news`.
        rollouts: {"entry": ..., "rollout": ...} of each rollout that it shows, the newest step first.
    """
    return _render(title, {"live": False, "answer": answer, "rollouts": rollouts}, frozen=True)


def run_facts(path: Path, config: RunConfig | None, *, state: str, age: str = "") -> dict[str, Any]:
    """What the page's head says of a run, and what it needs of its configuration (None: not written yet).

    state: "running", "ended" and the like. age: how long ago the newest step was written.
    """
    facts: dict[str, Any] = {"name": path.name, "state": state, "age": age, "shown": [], "config": "", "clamp": 1.0}
    if config is None:
        return facts | {"steps": 0, "objective": ""}
    return facts | {
        "steps": config.train.steps,
        "objective": config.objective.name,
        "clamp": config.objective.teacher_clamp,
        "config": to_yaml(config),
        "shown": _shown(config),
    }


def _shown(config: RunConfig) -> list[tuple[str, str]]:
    objective, alpha = config.objective.name, f" (α = {config.objective.alpha})"
    facts = [("Objective", objective + alpha if objective == "trrd" else objective)]
    for role, model in (("Student", config.student), ("Teacher", config.teacher)):
        if model.path:
            facts.append((role, f"{Path(model.path).name} ({model.precision}, {model.layout.text})"))
    return [*facts, ("Data", config.data.source)]


def _render(title: str, data: dict[str, Any], *, frozen: bool) -> str:
    data |= {"panels": [asdict(panel) for panel in PANELS], "no_phases": NO_PHASES}
    environment = Environment(
        loader=PackageLoader("rlad_megatron.observe", "page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    texts = {name: asset(name) if frozen else "" for name in ASSETS}
    style = texts.pop(STYLE)
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in texts.values())
    return environment.get_template("page.html.j2").render(
        title=title,
        frozen=frozen,
        policy=Markup(f"{POLICY}; script-src {hashes}"),
        style=Markup(style),
        scripts=[(name, Markup(text)) for name, text in texts.items()],
        # In a script element only "<" could end it.
        data=Markup(json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")),
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
