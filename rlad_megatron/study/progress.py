"""How far the tasks of a study are: what their folders say. Needs no torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from rlad_megatron.config import RunConfig
from rlad_megatron.config.messages import shown
from rlad_megatron.config.recipe import by_key, from_yaml, to_yaml
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.observe.metrics import read_metrics
from rlad_megatron.study.definition import StudyPlan, Task, Tuned
from rlad_megatron.trainer.run_state import CONFIG, write_whole

# Files in the folder of a task, next to those of its run.
TASK_CONFIG = "task.yaml"  # what the study gave it
EVALUATION = "evaluation.json"  # metrics of a student, or of the teacher, evaluated by itself
FINISHED = "finished"  # it has done everything
FAILED = "failed"  # the line that its last start failed with
OUTPUT = "output.log"

Metrics = list[dict[str, float]]


class NotChosen(ConfigError):
    """A task depends on variants that have not finished."""


def is_finished(plan: StudyPlan, task: Task) -> bool:
    return (plan.folder_of(task) / FINISHED).exists()


def state_of(plan: StudyPlan, task: Task) -> str:
    """For people: finished, failed and why, stopped at a step, or not begun."""
    folder = plan.folder_of(task)
    if is_finished(plan, task):
        return "finished"
    if (folder / FAILED).exists():
        return f"failed: {(folder / FAILED).read_text().strip()}"
    lines = read_metrics(folder)
    return f"stopped after step {lines[-1]['step']:g}" if lines else "not begun"


def prepare(plan: StudyPlan, task: Task) -> RunConfig:
    """Write the configuration of a task into its folder; returns it.

    Raises ConfigError as `task_config` and `check_same`.
    """
    config = task_config(plan, task)
    check_same(plan, task, config)
    folder = plan.folder_of(task)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TASK_CONFIG, to_yaml(config))
    return config


def check_same(plan: StudyPlan, task: Task, config: RunConfig) -> None:
    """Raise ConfigError if the folder of a task holds results of another configuration."""
    folder = plan.folder_of(task)
    if not ((folder / CONFIG).exists() or is_finished(plan, task)):
        return
    remedy = f"remove {folder} to run it again, restore the study, or give the study another name"
    if not (folder / TASK_CONFIG).exists():
        raise ConfigError(f"{folder} holds a run that is not of this study; {remedy}")
    there, here = (by_key(asdict(each)) for each in (from_yaml(folder / TASK_CONFIG), config))
    for key, value in here.items():
        if there[key] != value:
            said = f"{key}={shown(there[key])} there, {shown(value)} in the study"
            raise ConfigError(f"{folder} holds results of another configuration: {said}; {remedy}")


def check_all(plan: StudyPlan) -> None:
    """`check_same` of each task whose configuration is known."""
    for task in plan.tasks:
        if not isinstance(plan.study.arms.get(task.arm), Tuned) or task.kind == "candidate" or best(plan, task.arm):
            check_same(plan, task, task_config(plan, task))


def task_config(plan: StudyPlan, task: Task) -> RunConfig:
    """A task's configuration. Raises NotChosen if it depends on variants that have not finished."""
    given = plan.study.arms.get(task.arm)
    if not isinstance(given, Tuned) or task.kind == "candidate":
        return plan.config(task)
    chosen = best(plan, task.arm)
    if not chosen:
        waits = [each for each in plan.tasks if each.arm == task.arm and each.kind == "candidate"]
        states = [f"{each.title}: {state_of(plan, each)}" for each in waits if not is_finished(plan, each)]
        raise NotChosen(f"arm {task.arm}: no variant is chosen yet ({'; '.join(states)}); run these first")
    return plan.config(task, chosen)


def tuned_accuracies(plan: StudyPlan, arm: str) -> dict[str, float]:
    """Final held-out accuracy of an arm's variants that have finished."""
    tasks = [task for task in plan.tasks if task.arm == arm and task.kind == "candidate" and is_finished(plan, task)]
    return {task.candidate: final(run_metrics(plan.folder_of(task)))["eval/accuracy"] for task in tasks}


def best(plan: StudyPlan, arm: str) -> str:
    """The variant with the best final accuracy, the first of equals; empty until all have finished."""
    given, found = plan.study.arms[arm], tuned_accuracies(plan, arm)
    assert isinstance(given, Tuned)
    return max(given.candidates, key=lambda name: found[name]) if len(found) == len(given.candidates) else ""


def run_metrics(folder: Path) -> Metrics:
    """The metrics of a run by step. An evaluation of its student by itself belongs to the last step."""
    lines = read_metrics(folder)
    if evaluation := read_evaluation(folder):
        lines = [*lines[:-1], (lines[-1] if lines else {"step": 0}) | evaluation]
    return lines


def read_evaluation(folder: Path) -> dict[str, float]:
    """What `rlad evaluate --output` wrote; empty without it. Raises DataError if it is damaged."""
    file = folder / EVALUATION
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        raise DataError(f"{file} is no JSON; remove it and {file.with_name(FINISHED)}, and start again") from None


def final(metrics: Metrics) -> dict[str, float]:
    """The last step with an evaluation; empty without one."""
    return next((line for line in reversed(metrics) if math.isfinite(line.get("eval/accuracy", math.nan))), {})
