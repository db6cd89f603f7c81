"""The folder of a Megatron checkpoint:

    FOLDER/latest_checkpointed_iteration.txt    a number, or "release"
    FOLDER/iter_0000050/ or FOLDER/release/     the checkpoint

Torch-free.
"""

from __future__ import annotations

from pathlib import Path

from rlad_megatron.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def find_iteration(path: str | Path) -> tuple[Path, str]:
    """(folder with the checkpoint's files, iteration or "release") of a Megatron checkpoint folder.

    `path` may be the folder with the tracker file, an iteration's folder, or the checkpoint folder of a run.

    Raises:
        CheckpointError: no checkpoint there.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        number = path.name.removeprefix("iter_").removeprefix("step_")
        return path, str(int(number)) if number.isdecimal() else RELEASE
    for tracker, folder in ((TRACKER, "iter_{:07d}"), ("latest", "step_{:08d}")):
        if (path / tracker).is_file():
            value = (path / tracker).read_text(errors="replace").strip()
            if value != RELEASE and not value.isdecimal():
                raise CheckpointError(f"{path / tracker}: {value!r} is neither a number nor {RELEASE!r}; fix the file")
            found = path / (RELEASE if value == RELEASE else folder.format(int(value)))
            if any(found.glob("mp_rank_*")):
                raise CheckpointError(f"{found}: format 'torch' is not covered; save it with --ckpt-format torch_dist")
            if not (found / ".metadata").is_file():
                raise CheckpointError(f"{found}: .metadata not found, though {path / tracker} names it; copy it again")
            return found, value
    raise CheckpointError(f"{path}: neither {TRACKER} nor .metadata found; give a Megatron checkpoint (torch_dist)")


def is_megatron(path: str | Path) -> bool:
    """Whether the folder looks like a Megatron checkpoint rather than a Hugging Face one."""
    path = Path(path)
    if any((path / name).is_file() for name in (TRACKER, ".metadata")):
        return True
    return (path / "latest").is_file() and any(path.glob("step_*"))  # other tools write "latest" too
