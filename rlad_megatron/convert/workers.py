"""Share a conversion between processes of this machine, and collect their results."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from rlad_megatron.convert.targets import Target
from rlad_megatron.errors import CheckpointError, RladError

_REPORT_EVERY_S = 0.2
OnBytes = Callable[[int], None]  # called with progress in bytes


@contextmanager
def start(target: Target) -> Iterator[Callable[[OnBytes], list[list]]]:
    """Start the conversion's processes; yields the function that waits until everything is written.

    The processes are forks, so they share the layout and start at once. Start them before other threads run.

    Raises (when waiting):
        RladError: the error of the process that failed first; the others are killed.
    """
    if target.conversion.processes == 1:
        yield lambda on_bytes: target.write(0, on_bytes)
        return
    context = multiprocessing.get_context("fork")
    processes = []
    numbers: dict[Connection, int] = {}  # of the processes, by the connection to each
    try:
        for number in range(target.conversion.processes):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(target, number, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a dead process shows as end of file
            processes.append(process)
            numbers[ours] = number
        yield lambda on_bytes: _collect(processes, numbers, on_bytes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(processes: list, running: dict[Connection, int], on_bytes: OnBytes) -> list[list]:
    """A process sends its progress in bytes, then its results, or the error to raise."""
    results: dict[int, list] = {}
    while running:
        for connection in wait(list(running)):
            assert isinstance(connection, Connection)  # `wait` also takes sockets
            number = running[connection]
            try:
                message: Any = connection.recv()
            except EOFError:
                processes[number].join()
                raise CheckpointError(
                    f"process {number} ended with exit code {processes[number].exitcode}; "
                    "was it out of memory? use fewer --processes"
                ) from None
            if isinstance(message, Exception):
                raise message
            if isinstance(message, int):
                on_bytes(message)
            else:
                results[number] = message
                del running[connection]
    return [result for number in sorted(results) for result in results[number]]


def _work(target: Target, number: int, connection: Connection) -> None:
    """The body of a process."""
    import torch

    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the command kills these and cleans up
    command = os.getppid()
    pending, sent_at = 0, time.monotonic()

    def on_bytes(count: int) -> None:
        nonlocal pending, sent_at
        if os.getppid() != command:  # it was killed: do not write next to a new conversion
            os._exit(1)
        pending += count
        if time.monotonic() - sent_at > _REPORT_EVERY_S:
            connection.send(pending)
            pending, sent_at = 0, time.monotonic()

    try:
        results = target.write(number, on_bytes)
        connection.send(pending)
        connection.send(results)
    except RladError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"process {number} failed\n{traceback.format_exc()}"))
