"""Processes that tests look for."""

from contextlib import suppress

import psutil


def children(pid: int, word: str, *, recursive: bool = False) -> list[psutil.Process]:
    """Children of a process whose command has `word`, in the order of their start. Leaves out those that have ended."""
    found = []
    for child in psutil.Process(pid).children(recursive=recursive):
        with suppress(psutil.NoSuchProcess):
            if word in " ".join(child.cmdline()):
                found.append(child)
    return sorted(found, key=psutil.Process.create_time)
