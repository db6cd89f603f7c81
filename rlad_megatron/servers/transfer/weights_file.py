"""The file that carries weights to servers: where it is, how it says its version, and how it goes away.

The first rank removes it when it leaves its servers; if that rank is killed, a child of it does (`removed_at_exit`). A
signal to a whole job step can kill both, so the launcher (launch/local.py) or the server's task (launch/slurm.py)
removes what is left at its own end. This module is the child too, so it imports only the standard library:

    python -m rlad_megatron.servers.transfer.weights_file PARENT_PID FILE ...
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

VERSION_KEY = "weight_version"  # in the safetensors metadata
MEMORY_DIR = Path("/dev/shm")
TEMPORARY = ".tmp"  # suffix of a file that is not complete
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def version_text(version: int) -> str:
    """A version at fixed width, so that it can be rewritten in place."""
    return f"{version:020d}"


def possible_files(run_dir: Path) -> tuple[Path, Path]:
    """Where the run's file may be: in memory, else in the run folder. Its name is a hash of the folder's path."""
    folder = run_dir.resolve()
    name = f"rlad_{hashlib.sha1(str(folder).encode()).hexdigest()[:16]}.safetensors"
    return MEMORY_DIR / name, folder / name


@contextmanager
def removed_at_exit(paths: Sequence[Path]) -> Iterator[None]:
    """Remove the files at the end of the context, also when this process does not live to see it.

    Enter it in the main thread: Linux tells the child of the end of the thread that started it.
    """
    command = [sys.executable, "-m", __name__, str(os.getpid()), *map(str, paths)]
    null = subprocess.DEVNULL
    watcher = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()
        remove(paths)


def remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
        path.with_suffix(TEMPORARY).unlink(missing_ok=True)


def main(parent: int, paths: Sequence[Path]) -> None:
    """Wait for the end of the parent, then remove its files. Signals to a whole job do not end this earlier."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() == parent:
        signal.sigwait({signal.SIGUSR1})
    remove(paths)


if __name__ == "__main__":
    main(int(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
