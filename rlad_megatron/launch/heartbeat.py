"""Signs of life of the ranks, and who did not arrive when a collective times out.

Each rank touches a file in a folder that all ranks and the launcher see. After a time-out a rank says that it waited;
those that do not say so are the ones that others waited for.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlad_megatron.errors import TrainingError

BEAT_S = 2.0
SILENT_S = 15.0  # more than a busy machine keeps a thread waiting
GATHER_S = 4.0  # within which all ranks of a collective notice its time-out
ALIVE, WAITED = "alive", "waited"
NOW = "now"  # a file that is touched to know the time of the file server


@contextmanager
def heartbeat(folder: Path, rank: int, world_size: int, timeout_s: float) -> Iterator[None]:
    """Beat within the block, and name the missing ranks if a collective in it times out (as TrainingError)."""
    folder.mkdir(parents=True, exist_ok=True)
    beat = folder / f"{ALIVE}_{rank}"
    beat.write_text(f"{socket.gethostname()}, process {os.getpid()}")
    ended = threading.Event()
    threading.Thread(target=_beat, args=(beat, ended), daemon=True).start()
    try:
        yield
    except RuntimeError as error:  # torch has no class of its own for it
        if not re.search(r"timed? ?out", str(error), re.IGNORECASE):
            raise
        (folder / f"{WAITED}_{rank}").touch()
        time.sleep(GATHER_S)
        raise TrainingError(
            f"a collective did not end within train.distributed_timeout_s={timeout_s:g}: "
            f"{missing_ranks(folder, range(world_size)) or 'every rank waited, so see the network between them'}; fix "
            "that, or raise the timeout, and continue with resume=true"
        ) from error
    finally:
        ended.set()


def _beat(beat: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(OSError):
            os.utime(beat)


def missing_ranks(folder: Path, ranks: range) -> str:
    """The ranks that did not say that they waited, in words; empty if all did."""
    missing = [rank for rank in ranks if not (folder / f"{WAITED}_{rank}").exists()]
    return "; ".join(_describe(folder, rank) for rank in missing[:4]) + (" ..." if len(missing) > 4 else "")


def silent_ranks(folder: Path, ranks: range) -> str:
    """The ranks that gave no sign of life for SILENT_S, in words; empty if there are none."""
    return "; ".join(_describe(folder, rank) for rank in ranks if _silence(folder / f"{ALIVE}_{rank}") > SILENT_S)


def _describe(folder: Path, rank: int) -> str:
    beat = folder / f"{ALIVE}_{rank}"
    silence = _silence(beat)
    where = beat.read_text() if beat.exists() else "never started"
    if silence > SILENT_S:
        silent = f"has given no sign of life for {silence:.0f} s"
        return f"rank {rank} ({where}) {silent} (was it stopped, or is its host gone?)"
    return f"rank {rank} ({where}) did not arrive, but is alive; see its log"


def _silence(beat: Path) -> float:
    """Seconds since a beat; 0 for a rank that has not begun."""
    now = beat.with_name(NOW)
    try:
        now.touch()
        return now.stat().st_mtime - beat.stat().st_mtime
    except OSError:
        return 0.0
