"""What is new in files that another process, perhaps on another host, writes: whole lines, each read once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


class Tail:
    """Follows a file of lines that grows at its end. It may be missing at first, or be replaced by a shorter one.

    The file stays open between polls: while it is, its inode cannot become that of the file that replaces it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restarts = 0  # how often the file was replaced, so that what was read before no longer counts
        self.first = 1  # the number of the last poll's first line
        self._file: BinaryIO | None = None
        self._read: tuple[int, int] = 0, 0  # bytes and lines that were read
        self._before: tuple[int, int] = 0, 0  # the last poll

    def poll(self) -> list[bytes]:
        """The lines that were completed since the last poll; after a restart all lines. A cut last line waits."""
        if self._file is not None and self._was_replaced():
            self.close()
            self.restarts += 1
        if self._file is None:
            try:
                self._file = self.path.open("rb")
            except FileNotFoundError:
                return []
        offset, count = self._before = self._read
        self._file.seek(offset)
        whole, newline, _ = self._file.read().rpartition(b"\n")
        lines = whole.split(b"\n") if newline else []
        self._read, self.first = (offset + len(whole) + len(newline), count + len(lines)), count + 1
        return lines

    def unread(self) -> None:
        """Give the lines of the last poll again at the next one."""
        self._read = self._before

    def close(self) -> None:
        """Forget what was read."""
        if self._file is not None:
            self._file.close()
        self._file, self._read, self._before = None, (0, 0), (0, 0)

    def _was_replaced(self) -> bool:
        assert self._file is not None
        try:
            ours, theirs = os.fstat(self._file.fileno()), self.path.stat()
        except OSError:  # removed; on NFS by another host, which makes the handle stale
            return True
        return not os.path.samestat(ours, theirs) or theirs.st_size < self._read[0]
