"""The state of a run folder and its checkpoints, read without Megatron (and without torch, except to resume)."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from pathlib import Path

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import CheckpointError, ConfigError, RunComplete
from rlad_megatron.models.checkpoint_files import DIGESTS, find_damage, find_missing

META = "run.json"
LATEST = "latest"  # a file with the step of the newest checkpoint
CONFIG = "config.yaml"
LOCK = "lock"  # says who writes the folder now (launch/lock.py)


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
    checkpoints = run_dir / "checkpoints"
    has_run = (run_dir / CONFIG).exists() or bool(steps_in(checkpoints)) or (checkpoints / LATEST).exists()
    if has_run and not config.resume:
        raise ConfigError(
            f"name={config.name}: {run_dir} holds an earlier run; continue with resume=true, "
            "choose another name, or remove the folder"
        )
    step = config.resume_step or latest_step(checkpoints) or max(steps_in(checkpoints), default=None)
    if step is not None and config.train.steps < step:
        raise ConfigError(f"train.steps={config.train.steps}, but {run_dir} is at step {step}; use more than {step}")
    if step == config.train.steps and _reported(config):
        raise RunComplete(f"{run_dir} is complete at step {step}; to train on, raise train.steps")
    if config.resume and not _holds_anything(run_dir):
        runs = [file.parent.name for file in Path(config.runs_dir).glob(f"*/{CONFIG}")]
        near = difflib.get_close_matches(config.name, runs, n=1)
        hint = f"did you mean name={near[0]}? " if near else ""
        raise ConfigError(
            f"resume=true, but {run_dir} does not exist (name={config.name}, runs_dir={config.runs_dir}); {hint}give "
            "name and runs_dir of the run to continue, or resume=false to start a new one"
        )


def _holds_anything(run_dir: Path) -> bool:
    return run_dir.is_dir() and any(path.name != LOCK for path in run_dir.iterdir())


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


def _reported(config: RunConfig) -> bool:
    """Whether the report is newer than the newest checkpoint, so that nothing is left to export."""
    report, latest = config.report, config.run_dir / "checkpoints" / LATEST
    return report.is_file() and latest.is_file() and report.stat().st_mtime_ns >= latest.stat().st_mtime_ns


def checkpoint_dir(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in `checkpoints/`, ascending. Their folders get these names when they are whole."""
    names = (path.name.removeprefix("step_") for path in folder.glob("step_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def latest_step(folder: Path) -> int | None:
    """The step that the file `latest` names; None without one, or if its text is no number."""
    try:
        return int((folder / LATEST).read_text())
    except (OSError, ValueError):
        return None


def write_latest(folder: Path, step: int) -> None:
    write_whole(folder / LATEST, str(step))


def write_whole(file: Path, text: str) -> None:
    """Write a file at once: a full disk leaves no part of it, but the file that was there before."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def find_checkpoint(folder: Path, step: int = 0) -> Path | None:
    """The checkpoint in `checkpoints/` that a run resumes from; None if there is none yet.

    It is that of `step`; with step 0 the one that `latest` names or, where `latest` is missing or damaged, the newest
    whose files have the digests that they were written with.

    Raises:
        CheckpointError: it is not there; or no checkpoint is sound.
    """
    steps = steps_in(folder)
    wanted = step or latest_step(folder)
    if wanted is None and steps:
        wanted = newest_sound_step(folder)
        if wanted is None:
            damage = damage_of(checkpoint_dir(folder, steps[-1]))
            raise CheckpointError(f"{damage}; no checkpoint in {folder} is sound: start again under another name")
    if wanted is None:
        return None
    if wanted not in steps:
        who = f"resume_step={step}" if step else str(folder / LATEST)
        raise CheckpointError(f"{checkpoint_dir(folder, wanted)}: not found, but {who} names it; {remedy(folder)}")
    return checkpoint_dir(folder, wanted)


def newest_sound_step(folder: Path, before: int | None = None) -> int | None:
    """The newest checkpoint, perhaps before a step, whose files have the digests that they were written with."""
    steps = (step for step in reversed(steps_in(folder)) if before is None or step < before)
    return next((step for step in steps if not damage_of(checkpoint_dir(folder, step))), None)


def damage_of(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """`find_damage` of a run's checkpoint, which has `run.json` and, since that names its run, digests."""
    return _lost(checkpoint) or find_damage(checkpoint, share)


def _lost(checkpoint: Path) -> str | None:
    meta, digests = checkpoint / META, checkpoint / DIGESTS
    if not meta.is_file():
        return f"{meta}: not found"
    if not digests.is_file() and '"run":' in meta.read_text(errors="replace"):
        return f"{digests}: not found, though the checkpoint was written with it"
    return None


def remedy(folder: Path, broken: int | None = None) -> str:
    """What to do about a checkpoint that cannot be used, as the end of a message."""
    step = newest_sound_step(folder, before=broken)
    if step is None:
        return "no earlier checkpoint is sound, so start again under another name"
    return f"continue from the newest sound checkpoint with resume=true resume_step={step}"


def read_meta(checkpoint: Path) -> dict:
    """A checkpoint's `run.json`: "model" (fingerprint), "layout", "layers", "run" and "loop".

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = checkpoint / META
    try:
        meta = json.loads(file.read_text())
        if not isinstance(meta["loop"]["step"], int) or not {"model", "layout"} <= meta.keys():
            raise KeyError("loop")
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"damaged, {type(error).__name__}: {error}"
        raise CheckpointError(f"{file}: {why}; {remedy(checkpoint.parent, step_of(checkpoint))}") from error


def check_resumable(checkpoint: Path, model_fingerprint: str, verb: str) -> dict:
    """The loop's state in a checkpoint.

    Raises:
        CheckpointError: it is damaged, or from another model, another verb ("train", "sft"), or a newer Megatron-Core.
    """
    from rlad_megatron.platform.megatron_versions import check_loadable  # imports torch

    meta, folder = read_meta(checkpoint), checkpoint.parent
    if missing := _lost(checkpoint) or find_missing(checkpoint):
        raise CheckpointError(f"{missing}; {remedy(folder, step_of(checkpoint))}")
    check_loadable(checkpoint)
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
