"""What a run's checkpoints say of themselves, read without Megatron: the newest one, its model, the loop's state."""

from __future__ import annotations

import json
from pathlib import Path

from rlad_megatron.errors import CheckpointError
from rlad_megatron.platform.megatron_versions import check_loadable

META = "run.json"


def checkpoint_dir(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def latest_step(folder: Path) -> int | None:
    """The newest complete checkpoint's step, or None."""
    tracker = folder / "latest"
    return int(tracker.read_text()) if tracker.is_file() else None


def read_meta(folder: Path) -> dict:
    """`run.json` of the newest checkpoint, of which there must be one: "model" (fingerprint), "layout" and "loop".

    Raises:
        CheckpointError: `latest` names a checkpoint that is not there.
    """
    step = latest_step(folder)
    assert step is not None
    meta = checkpoint_dir(folder, step) / META
    if not meta.is_file():
        raise CheckpointError(
            f"{meta}: not found, though {folder / 'latest'} names it; write an earlier step into latest"
        )
    return json.loads(meta.read_text())


def check_resumable(folder: Path, model_fingerprint: str, verb: str) -> dict:
    """The loop's state in the newest checkpoint.

    Raises:
        CheckpointError: it is of another model, of another verb ("train", "sft"), or of a newer Megatron-Core.
    """
    meta = read_meta(folder)
    check_loadable(checkpoint_dir(folder, latest_step(folder)))
    if meta["model"] != model_fingerprint:
        raise CheckpointError(
            f"resume=true, but the checkpoint in {folder} is of another model than student.path; "
            "give the student that the run began with, or another name"
        )
    if meta["loop"]["verb"] != verb:
        raise CheckpointError(
            f"resume=true, but the checkpoint in {folder} is of `rlad {meta['loop']['verb']}`; give another name"
        )
    return meta["loop"]
