"""The files of a checkpoint: names that stay inside its folder, and digests that show damage. Torch-free.

`digests.json` is written with the files and compared when they are read: `{"files": {NAME: BLAKE3}, "source": ...}`,
where "source" has the digests of the checkpoint that a conversion read. It shows damage, not malice: whoever can change
a file can change this one too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlad_megatron.errors import CheckpointError

DIGESTS = "digests.json"
THREADS = 8  # each reads a file
BUFFER_BYTES = 1 << 20


def file_in(folder: Path, name: object, listed_in: Path) -> Path:
    """A file of the checkpoint in `folder`, by its name in another file.

    Raises:
        CheckpointError: the name is not one of a file in this folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\0"} & set(name):
        raise CheckpointError(f"{listed_in}: {name!r:.100} is not the name of a file next to it; copy it again")
    return folder / name


def digests_of(folder: Path, names: Iterable[str], on_bytes: Callable[[int], object] = int) -> dict[str, str]:
    """The digest of each of the folder's files, in threads.

    on_bytes: called with the size of each file when it is done.
    Raises OSError.
    """
    from blake3 import blake3  # not on a login node

    def digest(name: str) -> str:
        found, buffer, size = blake3(), memoryview(bytearray(BUFFER_BYTES)), 0
        with open(folder / name, "rb", buffering=0) as file:  # not mapped: there an error of the disk is a signal
            while count := file.readinto(buffer):
                found.update(buffer[:count])
                size += count
        on_bytes(size)
        return found.hexdigest()

    names = sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def write_digests(folder: Path, files: Mapping[str, str], source: Mapping[str, str] | None = None) -> None:
    content = {"files": files} | ({"source": source} if source else {})
    (folder / DIGESTS).write_text(json.dumps(content, indent=2) + "\n")


def read_digests(folder: Path, part: str = "files") -> dict[str, str]:
    """The recorded digests by file; none in checkpoints of other programs.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = folder / DIGESTS
    try:
        recorded = json.loads(file.read_text()).get(part, {})
        return {file_in(folder, name, file).name: str(digest) for name, digest in recorded.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged ({error})") from error


def find_missing(folder: Path) -> str | None:
    """The first file of the folder that is recorded and not there, in words; None if all are."""
    try:
        names = sorted(read_digests(folder))
    except CheckpointError as error:
        return str(error)
    gone = (folder / name for name in names if not (folder / name).is_file())
    return next((f"{file}: not found, though {DIGESTS} lists it" for file in gone), None)


def find_damage(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the first damaged file of the folder, in words; None if nothing is.

    share: (number of this process, processes that share the files).
    """
    if missing := find_missing(folder):
        return missing
    recorded = read_digests(folder)
    names = sorted(recorded)[slice(share[0], None, share[1])]
    try:
        found = digests_of(folder, names)
    except OSError as error:
        return f"{folder}: cannot be read ({error})"
    damaged = (folder / name for name in names if found[name] != recorded[name])
    return next((f"{file}: damaged: it has another digest than when it was written" for file in damaged), None)


def check_undamaged(folder: Path) -> None:
    """Raise CheckpointError that names the first damaged file of the folder."""
    if damage := find_damage(folder):
        raise CheckpointError(f"{damage}; copy the checkpoint again")
