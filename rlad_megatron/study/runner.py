"""Run the tasks of a study in turn, each as a command of its own; go on where it stopped. Needs no torch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlad_megatron.config import RunConfig
from rlad_megatron.study.definition import StudyPlan, Task
from rlad_megatron.study.progress import (
    EVALUATION,
    FAILED,
    FINISHED,
    OUTPUT,
    TASK_CONFIG,
    NotChosen,
    final,
    is_finished,
    prepare,
    run_metrics,
)
from rlad_megatron.trainer.run_state import CONFIG, write_whole

DROPPED = ("checkpoints", "hf")  # of a finished run: the report needs neither

# Run `rlad` with these arguments, its output appended to a file; returns the exit code.
Command = Callable[[Sequence[str], Path], int]


class Stopped(Exception):
    """A signal has stopped a command of the study. No error."""


def run_tasks(plan: StudyPlan, tasks: Sequence[Task], command: Command, stopped: Callable[[], bool]) -> int:
    """Run tasks in turn, without those that have finished. Prints two lines for each.

    A task that fails is recorded, and the others go on. Returns the number of failures.

    Raises:
        ConfigError: the folder of a task holds results of another configuration.
        Stopped: once `stopped`.
    """
    failures = 0
    for task in tasks:
        if is_finished(plan, task):
            continue
        folder = plan.folder_of(task)
        print(f"[{plan.tasks.index(task)} of 0-{len(plan.tasks) - 1}] {task.title}: {folder / OUTPUT}", flush=True)
        begin = time.monotonic()
        why = _run(plan, task, command, stopped)
        if why and stopped():
            raise Stopped
        if why:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / FAILED, f"{why}\n")
            failures += 1
            print(f"    failed: {why}", flush=True)
            continue
        accuracy = final(run_metrics(folder))["eval/accuracy"]
        (folder / FINISHED).touch()  # first: without its checkpoints the run would begin again
        for name in DROPPED:
            shutil.rmtree(folder / name, ignore_errors=True)
        print(f"    held-out accuracy {accuracy:.3f}, {time.monotonic() - begin:.0f} s", flush=True)
        if stopped():
            raise Stopped
    return failures


def _run(plan: StudyPlan, task: Task, command: Command, stopped: Callable[[], bool]) -> str:
    """Run a task to its end; returns why it failed, or nothing."""
    folder = plan.folder_of(task)
    try:
        config = prepare(plan, task)
    except NotChosen as error:
        return str(error)
    (folder / FAILED).unlink(missing_ok=True)
    log = folder / OUTPUT
    for arguments in _commands(task, config):
        if stopped():
            return "stopped"
        begin = log.stat().st_size if log.exists() else 0
        code = command(arguments, log)
        if code:
            return f"rlad {arguments[0]} ended with code {code}: {_last_line(log, begin)}"
    if not final(run_metrics(folder)):
        return f"it measured no held-out accuracy; see {folder / OUTPUT}"
    return ""


def _commands(task: Task, config: RunConfig) -> list[list[str]]:
    """The commands that make up a task."""
    folder, file = config.run_dir, str(config.run_dir / TASK_CONFIG)
    output = ["--output", str(folder / EVALUATION)]
    if task.kind == "teacher":
        return [["evaluate", file, *output]]
    resume = ["resume=true"] if (folder / CONFIG).exists() else []
    if config.generates:
        return [["train", file, *resume]]
    return [["sft", file, *resume], ["evaluate", file, f"student.path={folder / 'hf'}", *output]]


def _last_line(log: Path, begin: int) -> str:
    """Of a failed command, whose output begins at this byte: its error, or its last line."""
    output = log.read_bytes()[begin:].decode(errors="replace") if log.exists() else ""
    lines = [line for line in output.splitlines() if line.strip()]
    said = [line.removeprefix("rlad: ") for line in lines if line.startswith("rlad: ")]
    return (said or lines or ["it said nothing"])[-1]
