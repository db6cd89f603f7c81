"""The processes of the reward pool: how one starts, ends and scores a response. Imports no torch, to start quickly."""

from __future__ import annotations

import faulthandler
import io
import os
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import NoReturn

from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.processes import end_with_parent
from rlad_megatron.rewards.registry import Reward, RewardResult, load_reward, what_is_wrong
from rlad_megatron.types import Prompt


class Worker(SpawnProcess):
    """A process that ends with what the reward started."""

    terminate = SpawnProcess.kill  # native code does not notice SIGTERM

    def is_alive(self) -> bool:
        """pebble calls this ten times a second, and after each `terminate`."""
        alive = super().is_alive()
        if not alive and self.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        return alive


class WorkerContext(SpawnContext):
    """The `multiprocessing` context whose processes are workers."""

    Process = Worker


class PrefixedLog(io.TextIOBase):
    """Standard output and error of Python code in the worker. Each line starts with the prompt's id."""

    def __init__(self) -> None:
        self.prompt = "import"
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            os.write(1, f"[{self.prompt}] {line}\n".encode(errors="backslashreplace"))
        return len(text)

    def end_line(self) -> None:
        if self._line:
            self.write("\n")

    def fileno(self) -> int:
        return 1


_log = PrefixedLog()
_reward: Reward | ConfigError  # or why it cannot be imported


def start(name: str, log: str, timeout_s: float) -> None:
    """Import the reward in a new worker, which exits if that takes longer. Its output goes to the file `log`."""
    global _reward
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a rank ignores it, and what the reward starts would too
    os.setsid()  # a process group with what the reward starts
    os.environ["OMP_NUM_THREADS"] = "1"  # there is a worker for every core
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = _log
    os.fork = os.forkpty = _refuse_to_fork  # the copy would answer for the worker
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    try:
        _reward = load_reward(name)
    except BaseException as error:  # user code may raise anything
        _reward = ConfigError(f"data.reward={name!r}: importing it {_raised(error.__cause__ or error)}; see {log}")
    faulthandler.cancel_dump_traceback_later()


def score(prompt: Prompt, text: str) -> RewardResult:
    """Raises DataError if the reward fails, and ConfigError if it could not be imported."""
    if isinstance(_reward, ConfigError):
        raise _reward
    _log.prompt = prompt.id
    try:
        result = _reward(prompt, text)
        wrong = what_is_wrong(result)
        if not wrong:
            parts = {name: float(value) for name, value in result.parts.items()}
            return RewardResult(float(result.score), bool(result.solved), parts)
        fault = f"returned {_in_a_line(repr(result), 200)}: {wrong}"
    except BaseException as error:  # user code may raise anything, SystemExit too
        fault = _raised(error)
    finally:
        _log.end_line()
    raise DataError(fault)


def _refuse_to_fork() -> NoReturn:
    raise OSError("a reward must not fork; use `subprocess`")


def _raised(error: BaseException) -> str:
    traceback.print_exception(error)  # into the log
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = _in_a_line(f"{type(error).__name__}: {error}", 300)
    return f"raised {text} ({frame.filename}:{frame.lineno})"


def _in_a_line(text: str, length: int) -> str:
    return " ".join(text.split())[:length]
