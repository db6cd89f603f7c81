"""What is new in files that another process, perhaps on another host, writes: whole lines, each read once."""

from __future__ import annotations

import os
from pathlib import Path


class Tail:
    """Follows a file of lines that grows at its end. It may be missing at first, or be replaced by a shorter one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restarts = 0  # how often the file was replaced, so that what was read before no longer counts
        self._offset = 0
        self._inode: int | None = None

    def poll(self) -> list[bytes]:
        """The lines that were completed since the last poll; after a restart all lines. A cut last line waits."""
        try:
            with self.path.open("rb") as file:
                now = os.fstat(file.fileno())
                if self._inode is not None and (now.st_ino != self._inode or now.st_size < self._offset):
                    self._restart()
                self._inode = now.st_ino
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            if self._inode is not None:
                self._restart()
            return []
        self._offset += len(whole) + len(newline)
        return whole.split(b"\n") if newline else []

    def _restart(self) -> None:
        self.restarts += 1
        self._offset, self._inode = 0, None
