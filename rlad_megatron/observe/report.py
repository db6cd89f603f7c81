"""`report.html`: the page about a run as one file. It opens from disk and needs no network."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from rlad_megatron.config import RunConfig
from rlad_megatron.observe.page import frozen_page, run_facts
from rlad_megatron.observe.rollout_index import RolloutIndex
from rlad_megatron.observe.run_folder import RunFolder

REPORT_STEPS = 25  # whose rollouts the report holds, evenly spread
REPORT_CHARACTERS = 4_000_000  # of all rollouts, about
MAX_CHARACTERS = 4000  # of a prompt or response
MAX_TOKENS = 1500  # of a response whose figures are kept
NOT_SHOWN = ("prompt_tokens",)


def write_report(config: RunConfig) -> Path:
    """Write the report of a run from what is in its folder, and return its path. Replaces an older one atomically."""
    with closing(RunFolder(config.run_dir, REPORT_STEPS)) as folder:
        folder.poll()
        rollouts = _sample(folder.rollouts)
        state = "ended" if folder.has_all_steps(config) else "unfinished"
        answer = {"facts": run_facts(config.run_dir, config, state=state), "news": folder.news(0, 0, config)}
    page = frozen_page(config.name, answer, rollouts)
    path = config.report
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _sample(index: RolloutIndex) -> list[dict[str, Any]]:
    """Rollouts of the steps that were read, as many of each as there is room for; the newest step first."""
    chosen: list[dict[str, Any]] = []
    size = 0
    for entry in index.by_number():
        rollout = index.get(entry["file"], entry["number"])
        if rollout is None:
            continue
        short = _shortened(rollout)
        size += sum(len(str(value)) for value in short.values())
        if size > REPORT_CHARACTERS and chosen:
            break
        chosen.append({"entry": entry, "rollout": short})
    return sorted(chosen, key=lambda it: (-it["entry"]["step"], it["entry"]["number"]))


def _shortened(rollout: dict[str, Any]) -> dict[str, Any]:
    """A rollout of bounded size. `shortened` says in words what is missing."""
    short = {key: value for key, value in rollout.items() if key not in NOT_SHOWN}
    short |= {key: _shortened_text(rollout[key]) for key in ("prompt", "response")}
    count = len(rollout.get("response_tokens", ()))
    if count > MAX_TOKENS:
        short |= {
            key: value[:MAX_TOKENS] for key, value in short.items() if isinstance(value, list) and len(value) == count
        }
        short["shortened"] = f"the first {MAX_TOKENS:,} of {count:,} tokens; `rlad watch` shows all"
    return short


def _shortened_text(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"
