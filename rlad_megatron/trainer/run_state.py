"""What a run's folder and its checkpoints say of themselves, read without Megatron and, but for resuming, torch."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import CheckpointError, ConfigError

META = "run.json"
CONFIG = "config.yaml"


def has_run(run_dir: Path) -> bool:
    """Whether a run has begun in the folder, be it without a checkpoint yet. A job's logs alone are no run."""
    return (run_dir / CONFIG).exists() or latest_step(run_dir / "checkpoints") is not None


def check_run_dir(config: RunConfig) -> None:
    """Raise ConfigError where a run would begin in another's folder, or with `resume` where there is no folder.

    A folder without a run is that of a start which failed early: to resume it is to begin.
    """
    run_dir = config.run_dir
    if not config.resume:
        if not has_run(run_dir):
            return
        raise ConfigError(
            f"name={config.name}: {run_dir} holds an earlier run; go on with resume=true, "
            "choose another name, or remove the folder"
        )
    if run_dir.is_dir():
        return
    runs = [file.parent.name for file in Path(config.runs_dir).glob(f"*/{CONFIG}")]
    near = difflib.get_close_matches(config.name, runs, n=1)
    hint = f"did you mean name={near[0]}? " if near else ""
    raise ConfigError(
        f"resume=true, but {run_dir} is not there (name={config.name}, runs_dir={config.runs_dir}); {hint}give name "
        "and runs_dir of the run to go on with, or resume=false to begin a new one"
    )


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
    from rlad_megatron.platform.megatron_versions import check_loadable  # imports torch

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
