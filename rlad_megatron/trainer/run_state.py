"""The state of a run folder and its checkpoints, read without Megatron (and without torch, except to resume)."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from pathlib import Path

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import CheckpointError, ConfigError, RunComplete

META = "run.json"
CONFIG = "config.yaml"
REPORT = "report.html"  # the last file that a run writes


def check_run_dir(config: RunConfig) -> None:
    """Check that a run can write its folder, and that it continues the run there only with `resume`.

    A folder without a run, perhaps with a job's logs, comes from a start that failed early; resuming it starts from
    the beginning.

    Raises:
        ConfigError: as said, `resume` names a missing folder, or the run is past `train.steps`.
        RunComplete: the run to resume has made all its steps and written its report.
    """
    check_writable(config)
    run_dir = config.run_dir
    step = latest_step(run_dir / "checkpoints")
    has_run = (run_dir / CONFIG).exists() or step is not None
    if has_run and not config.resume:
        raise ConfigError(
            f"name={config.name}: {run_dir} holds an earlier run; continue with resume=true, "
            "choose another name, or remove the folder"
        )
    if step is not None and config.train.steps < step:
        raise ConfigError(f"train.steps={config.train.steps}, but {run_dir} is at step {step}; use more than {step}")
    if step == config.train.steps and _reported(run_dir):
        raise RunComplete(f"{run_dir} is complete at step {step}; to train on, raise train.steps")
    if config.resume and not run_dir.is_dir():
        runs = [file.parent.name for file in Path(config.runs_dir).glob(f"*/{CONFIG}")]
        near = difflib.get_close_matches(config.name, runs, n=1)
        hint = f"did you mean name={near[0]}? " if near else ""
        raise ConfigError(
            f"resume=true, but {run_dir} does not exist (name={config.name}, runs_dir={config.runs_dir}); {hint}give "
            "name and runs_dir of the run to continue, or resume=false to start a new one"
        )


def check_writable(config: RunConfig) -> None:
    """Raise ConfigError if the run folder cannot be created or written."""
    there = next(path for path in (config.run_dir, *config.run_dir.parents) if os.path.exists(path))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ConfigError(
            f"runs_dir={config.runs_dir}, name={config.name}: {there} cannot hold the run's files ({error.strerror}); "
            "use a folder that you can write"
        ) from None


def _reported(run_dir: Path) -> bool:
    """Whether the report is newer than the newest checkpoint, so that nothing is left to export."""
    report, latest = run_dir / REPORT, run_dir / "checkpoints" / "latest"
    return report.is_file() and report.stat().st_mtime_ns >= latest.stat().st_mtime_ns


def checkpoint_dir(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def latest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    tracker = folder / "latest"
    return int(tracker.read_text()) if tracker.is_file() else None


def read_latest(folder: Path) -> tuple[Path, dict]:
    """The newest checkpoint and its `run.json`: "model" (fingerprint), "layout", "layers" and "loop".

    Raises:
        CheckpointError: `latest` names a missing checkpoint.
    """
    step = latest_step(folder)
    assert step is not None
    newest = checkpoint_dir(folder, step)
    if not (newest / META).is_file():
        raise CheckpointError(
            f"{newest / META}: not found, but {folder / 'latest'} names it; write an earlier step into latest"
        )
    return newest, json.loads((newest / META).read_text())


def check_resumable(folder: Path, model_fingerprint: str, verb: str) -> dict:
    """The loop's state in the newest checkpoint.

    Raises:
        CheckpointError: the checkpoint is from another model, another verb ("train", "sft"), or a newer Megatron-Core.
    """
    from rlad_megatron.platform.megatron_versions import check_loadable  # imports torch

    newest, meta = read_latest(folder)
    check_loadable(newest)
    if meta["model"] != model_fingerprint:
        raise CheckpointError(
            f"resume=true, but the checkpoint in {folder} is from another model than student.path; "
            "give the student that the run started with, or another name"
        )
    if meta["loop"]["verb"] != verb:
        raise CheckpointError(
            f"resume=true, but the checkpoint in {folder} is from `rlad {meta['loop']['verb']}`; give another name"
        )
    return meta["loop"]
