"""Runs a function on several gloo ranks of this machine: `run_ranks(fn, world_size, *args)`.

`fn(rank, world_size, *args)` must live at the top level of an importable module (it is pickled by name), and is
called with the default process group ready. Use it from a test in this folder: `from harness import run_ranks`.
"""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 540) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on every rank and return the results in rank order.

    Results and arguments must be picklable. Ranks meet through a file store, so that no port is taken.
    Raises RuntimeError with the traceback of the rank that failed first (the others are killed), and
    TimeoutError naming the ranks without a result after `timeout` seconds, which by default is before pytest's end.
    """
    spawner = context()
    with tempfile.TemporaryDirectory(prefix="rlad_ranks_") as folder:
        # Not daemons: code under test may start processes (Megatron's checkpoint writers do).
        ranks = [
            spawner.Process(target=_rank_main, args=(fn, r, world_size, folder, timeout, args))
            for r in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, Path(folder), timeout)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [torch.load(Path(folder) / f"result_{r}", weights_only=False) for r in range(world_size)]


@functools.cache
def context() -> multiprocessing.context.ForkServerContext:
    """Ranks are forked from one process that has imported all that they need, which takes a rank some ten seconds."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["preload"])
    before = dict(os.environ)
    # The first is read when OpenMP is loaded; the second is how that process finds preload.py and what it imports.
    folders = [*map(str, Path(__file__).parents[:2]), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return found


def _wait(ranks: list[Any], folder: Path, timeout: float) -> None:
    """Return when all ranks have ended well; raise at the first failure or at the deadline."""
    deadline = time.monotonic() + timeout
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        ended = multiprocessing.connection.wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            unfinished = [rank for rank in sorted(running.values()) if not (folder / f"result_{rank}").exists()]
            raise TimeoutError(f"no result from ranks {unfinished} after {timeout:g} s")
        for sentinel in ended:
            ranks[running[sentinel]].join()  # the sentinel may close a moment before the exit code is known
        codes = {running[sentinel]: ranks[running[sentinel]].exitcode for sentinel in ended}
        if any(code != 0 for code in codes.values()):
            # A dead rank makes its peers fail too: the earliest report is the cause.
            reports = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
            detail = reports[0].read_text() if reports else f"no traceback; exit codes by rank: {codes}"
            raise RuntimeError(f"a rank failed\n{detail}")
        for sentinel in ended:
            del running[sentinel]


def _rank_main(fn: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, args: tuple) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name may not resolve on a bare machine
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        torch.save(fn(rank, world_size, *args), Path(folder) / f"result_{rank}")
        dist.barrier()  # a rank must not close connections that a peer still uses
        dist.destroy_process_group()
    except BaseException:
        report = Path(folder) / f"partial_{rank}"
        report.write_text(f"rank {rank}:\n{traceback.format_exc()}")
        report.rename(Path(folder) / f"error_{rank}")
        raise SystemExit(1) from None
