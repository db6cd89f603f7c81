"""The processes of a world of ranks on this machine: how they start, what they report and how they end."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from rlad_megatron import platform
from rlad_megatron.config.placement import Task
from rlad_megatron.errors import USER_ERROR, RladError, file_error
from rlad_megatron.launch.rendezvous import set_rank_environment
from rlad_megatron.processes import end_with_parent

_SPAWN = multiprocessing.get_context("spawn")
TO_LAUNCHER = (signal.SIGINT, signal.SIGTERM)  # the launcher's to handle: a terminal sends them to ranks too
LONGEST = 8000  # characters of an error: the launcher reads it after the rank's end, and a pipe holds 64 KiB


@dataclass(frozen=True)
class Ended:
    """A rank's last word, or its silence."""

    rank: int
    finished: bool | None = None  # what its body returned; None if that did not return
    error: str = ""  # one line, of an error that the user can fix
    bug: str = ""  # one line, of any other exception
    code: int | None = None  # the process's exit code; negative: of a signal

    @property
    def failed(self) -> bool:
        return self.finished is None

    @property
    def how(self) -> str:
        """How a rank ended that said nothing."""
        if self.code is not None and self.code < 0:
            names = {int(number): number.name for number in signal.Signals}  # real-time signals have none
            return f"ended ({names.get(-self.code, f'signal {-self.code}')})"
        return f"ended with exit code {self.code} before it had finished"


class Ranks:
    """Starts `body(rank)` in a process for each rank of `world`. They end with this process."""

    def __init__(self, world: Sequence[Task], host: str, port: int, logs: Path, body: Callable[[int], bool]) -> None:
        """host, port: where rank 0 listens. logs: the folder for tracebacks. body: returns whether it finished."""
        self.logs = logs
        self._running: dict[int, tuple[SpawnProcess, Connection]] = {}
        for rank in range(len(world)):
            ours, theirs = _SPAWN.Pipe(duplex=False)
            process = _SPAWN.Process(target=_run, args=(rank, tuple(world), host, port, logs, body, theirs))
            before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_LAUNCHER)  # until the rank ignores them
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            self._running[rank] = process, ours

    @property
    def sentinels(self) -> list[int]:
        """To wait for the end of a rank."""
        return [process.sentinel for process, _ in self._running.values()]

    @property
    def running(self) -> list[int]:
        return list(self._running)

    def ended(self) -> list[Ended]:
        """The ranks that have ended since the last call."""
        found = []
        for rank, (process, connection) in list(self._running.items()):
            if process.exitcode is not None:
                said = _last_word(connection)
                found.append(said or Ended(rank, code=process.exitcode))
                del self._running[rank]
        return found

    def kill(self) -> None:
        for process, _ in self._running.values():
            process.kill()
        for process, _ in self._running.values():
            process.join()
        self._running.clear()


def _last_word(connection: Connection) -> Ended | None:
    try:
        return connection.recv() if connection.poll() else None
    except (EOFError, OSError):  # killed while it wrote
        return None


def wait_for_any(worlds: Sequence[Ranks], timeout_s: float) -> None:
    wait([sentinel for world in worlds for sentinel in world.sentinels], timeout_s)


def log_of(logs: Path, role: str, rank: int) -> Path:
    return logs / f"{role}_{rank}.log"


def _run(
    rank: int,
    world: tuple[Task, ...],
    host: str,
    port: int,
    logs: Path,
    body: Callable[[int], bool],
    report: Connection,
) -> None:
    """The process of a rank."""
    end_with_parent()
    for number in TO_LAUNCHER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_LAUNCHER)
    try:
        platform.prepare()
        set_rank_environment(world[rank], world, host, port)
        said = Ended(rank, finished=body(rank))
    except Exception as error:
        said = _what_failed(rank, error, log_of(logs, world[rank].role, rank))
    report.send(said)
    if said.failed:
        sys.exit(USER_ERROR)


def _what_failed(rank: int, error: Exception, log: Path) -> Ended:
    """The last word about an error, whose traceback goes to the log."""
    with suppress(OSError):  # perhaps that is the error
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            traceback.print_exception(error, file=file)
    refusal = file_error(error, log.parent.parent)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, RladError):
        return Ended(rank, error=f"{error!s:.{LONGEST}}")
    if refusal is not None:
        return Ended(rank, error=f"{refusal:.{LONGEST}}; fix that, and continue with resume=true")
    return Ended(rank, bug=f"{text:.300}; see {log}")
