"""The file that carries weights to servers: where it is, how it says its version, and how it goes away.

The first rank removes it when it leaves its servers. If that rank is killed, the launcher (launch/local.py) or the
server's task (launch/slurm.py) does. If those are killed too, a file in memory goes with their scratch folder. One in
the run folder stays: the run may go on somewhere else by then, under the same name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

VERSION_KEY = "weight_version"  # in the safetensors metadata
MEMORY_DIR = Path("/dev/shm")
TEMPORARY = ".tmp"  # suffix of a file that is not complete


def version_text(version: int) -> str:
    """A version at fixed width, so that it can be rewritten in place."""
    return f"{version:020d}"


def possible_files(run_dir: Path) -> tuple[Path, Path]:
    """Where the run's file may be: in memory, else in the run folder. Its name is a hash of the folder's path."""
    folder = run_dir.resolve()
    name = f"rlad_{hashlib.sha1(str(folder).encode()).hexdigest()[:16]}.safetensors"
    return MEMORY_DIR / name, folder / name


def in_memory(run_dir: Path) -> tuple[Path]:
    return possible_files(run_dir)[:1]


def all_files(run_dir: Path) -> tuple[Path, ...]:
    """All that may be left of a run: also a file that is not complete."""
    memory, file = possible_files(run_dir)
    return memory, file, file.with_suffix(TEMPORARY)


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):  # gone, or another user's under this name
            path.unlink()
