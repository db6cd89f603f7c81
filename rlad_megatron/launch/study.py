"""`rlad study` and `rlad compare`: the commands of a study's tasks as processes, signals, and one writer."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rlad_megatron.command import add_command, print_out
from rlad_megatron.errors import ConfigError, TrainingError
from rlad_megatron.launch.frozen import code_version
from rlad_megatron.launch.lock import only_writer
from rlad_megatron.launch.stop import stop_signals
from rlad_megatron.processes import end_with_parent
from rlad_megatron.study.definition import StudyPlan, load_study, study_names
from rlad_megatron.study.progress import check_all, is_finished
from rlad_megatron.study.runner import Stopped, run_tasks
from rlad_megatron.trainer.run_state import latest_step

POLL_S = 1.0

Main = Callable[[list[str]], int]


def add_study(commands: Any, main: Main) -> None:
    """Add the commands `study` and `compare`. main: as in `run_study`."""

    def study(options: argparse.Namespace) -> int:
        """Compare objectives or settings over several seeds.

        Runs each arm with each seed in runs/STUDY/, one after another, and goes on where it stopped when it is started
        again. Checkpoints of finished runs are removed. Writes studies/results/STUDY/: report.html,
        summary.json and summary.md, with paired differences and their 95% intervals. Exit code 1: a run failed; the
        others have gone on.
        """
        plan = load_study(options.study)
        options.after_interrupt = f"go on with: rlad study {shlex.quote(options.study)}"
        if options.report:
            check_all(plan)
            code = 0
        else:
            code = run_study(plan, options.task, main, options.stop_file)
        if code >= 128:
            print(f"rlad: stopped; {options.after_interrupt}", file=sys.stderr)
        elif options.task is None:
            from rlad_megatron.study.results import write_study_report

            print_out(f"report: {write_study_report(plan, code_version())}\n")
        return code

    def compare(options: argparse.Namespace) -> int:
        """Show runs side by side on one page.

        Runs that differ only in train.seed are one arm; the first one is the baseline of the paired differences. Runs
        that are still going are shown as far as they are.
        """
        from rlad_megatron.study.results import write_run_comparison

        write_run_comparison(options.runs, options.output)
        print_out(f"report: {options.output}\n")
        return 0

    command = add_command(commands, study)
    command.add_argument("study", metavar="STUDY", help=f"studies/NAME.py, or NAME: {', '.join(study_names())}")
    part = command.add_mutually_exclusive_group()
    part.add_argument("--task", type=int, metavar="I", help="run only the task with this index, as slurm/study.sh does")
    command.add_argument("--stop-file", type=Path, metavar="FILE", help="when it appears, stop as at SIGTERM")
    part.add_argument("--report", action="store_true", help="run nothing; write the report of what has finished")
    command = add_command(commands, compare)
    command.add_argument("runs", metavar="RUN", nargs="+", help="a run folder: runs/NAME")
    command.add_argument("--output", type=Path, default=Path("compare.html"), help="the page (%(default)s)")


def run_study(plan: StudyPlan, only: int | None, main: Main, stop_file: Path | None = None) -> int:
    """Run all tasks of a study that have not finished, or the one with the index `only`.

    The first SIGINT or SIGTERM, or the stop file, has the run at hand save and end.

    main: runs `rlad` with arguments, in a process of its own.

    Returns 0, 1 if a task failed, or the code that a shell reports for the signal (for the file: SIGTERM).

    Raises:
        ConfigError: no such task, results of another configuration, or another process runs the study.
        TrainingError: the stop file came before the one task had saved a step, so another start would stop there too.
    """
    count = len(plan.tasks)
    if only is not None and not 0 <= only < count:
        raise ConfigError(f"--task {only}: study {plan.name} has the tasks 0 to {count - 1}")
    check_all(plan)
    tasks = plan.tasks if only is None else [plan.tasks[only]]
    commands = Commands(main, stop_file)
    saved = [latest_step(plan.folder_of(task) / "checkpoints") for task in tasks]
    lock = only_writer(plan.folder, "study") if only is None else nullcontext()
    with stop_signals(commands.stop) as signals, lock:
        try:
            return int(run_tasks(plan, tasks, commands.run, lambda: commands.stopped) > 0)
        except Stopped:
            if only is not None and is_finished(plan, tasks[0]):
                return 0
            if stop_file and only is not None and saved == [latest_step(plan.folder_of(tasks[0]) / "checkpoints")]:
                raise TrainingError(
                    f"{tasks[0].title}: told to stop before a step was saved; give the job more time before its signal "
                    "(--time, --signal=B:USR1@SECONDS)"
                ) from None
            return 128 + (signals.first or signal.SIGTERM)


class Commands:
    """Runs one command after another, until it is told to stop."""

    def __init__(self, main: Main, stop_file: Path | None) -> None:
        self._main, self._stop_file = main, stop_file
        self._process: multiprocessing.process.BaseProcess | None = None
        self.stopped = False

    def run(self, arguments: Sequence[str], output: Path) -> int:
        """Run a command to its end, with its output appended to a file; returns its exit code."""
        target = partial(_command, self._main, list(arguments), output)
        self._process = multiprocessing.get_context("spawn").Process(target=target)
        self._process.start()
        try:
            while self._process.is_alive():
                self._process.join(POLL_S)
                if self._stop_file and self._stop_file.exists() and not self.stopped:
                    self.stop()
        finally:  # after a second signal
            if self._process.is_alive():
                self._process.terminate()
                self._process.join()
        code = int(self._process.exitcode or 0)
        return 128 - code if code < 0 else code

    def stop(self) -> bool:
        """Have the command at hand save and end; returns whether there is one."""
        self.stopped = True
        if self._process is None or not self._process.is_alive():
            return False
        print("rlad: stopping the run at hand, which saves its last step; again, to end at once", file=sys.stderr)
        self._process.terminate()
        return True


def _command(main: Main, arguments: list[str], output: Path) -> None:
    end_with_parent()
    os.setsid()  # a Ctrl-C of the terminal reaches the study, which passes it on once
    with output.open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    sys.exit(main(arguments))
