"""How processes begin, and end with the one that started them. Standard library only, for small processes."""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h

# A file in the temporary folder of a run: processes of the session with this leader (id, start) belong to it.
SESSION = "session_{}_{}"


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends. Called in a `multiprocessing` child.

    The parent may be gone already: the kernel then sends nothing.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Around a process's large imports: what they make is not searched for garbage, then or later.

    Of vLLM's that takes two of some twelve seconds, and of a rank's 0.4 of six.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # otherwise Triton's bindings complain at exit of what was not freed
        gc.enable()


def machine() -> list[str]:
    """Names the machine's present boot, and the namespace that process ids are of."""
    return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value)


def start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: ids are used again. None if it has ended."""
    fields = stat_of(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on: state, parent, process group, session ... None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
