"""A process that scores responses one after the other; `pool.py` starts it. Imports no torch, so it starts quickly."""

from __future__ import annotations

import ctypes
import io
import math
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

from rlad_megatron.rewards.registry import Reward, RewardResult, load_reward
from rlad_megatron.types import Prompt

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Fault:
    """What a reward did wrong. `ends_worker`: its process cannot be used again."""

    text: str
    ends_worker: bool = False


def main(descriptor: int, name: str, parent: int) -> None:
    """Score the (prompt, text) pairs that arrive until the connection closes.

    Sends None when the reward is imported, then a RewardResult or a Fault for each pair. The kernel kills this process
    when the parent dies.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    process = os.getpid()
    if os.getppid() != parent:  # it died before the line above
        return
    connection = Connection(descriptor)
    log = PrefixedLog()
    sys.stdout = sys.stderr = log
    try:
        reward = load_reward(name)
    except BaseException as error:  # user code may raise anything
        return connection.send(Fault(f"importing it {_raised(error)}"))
    connection.send(None)
    forks: list[bool] = []
    os.register_at_fork(after_in_parent=lambda: forks.append(True))  # `subprocess` does not call it
    while True:
        try:
            prompt, text = connection.recv()
        except EOFError:
            return None
        log.prompt = prompt.id
        forks.clear()
        outcome = _outcome(reward, prompt, text)
        if os.getpid() != process:
            os._exit(0)  # a copy that the reward forked and that returned from it
        log.end_line()
        connection.send(Fault("data.reward forked (use `subprocess`)", ends_worker=True) if forks else outcome)


def _outcome(reward: Reward, prompt: Prompt, text: str) -> RewardResult | Fault:
    try:
        result = reward(prompt, text)
        if not isinstance(result, RewardResult) or not math.isfinite(result.score):
            return Fault(f"data.reward returned {result!r:.200} instead of a RewardResult with a finite score")
        parts = {name: float(value) for name, value in result.parts.items()}
        return RewardResult(float(result.score), bool(result.solved), parts)
    except BaseException as error:  # user code may raise anything, SystemExit too
        return Fault(f"data.reward {_raised(error)}")


def _raised(error: BaseException) -> str:
    traceback.print_exception(error)  # into the log
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())  # one line
    return f"raised {text:.300} ({frame.filename}:{frame.lineno})"


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
