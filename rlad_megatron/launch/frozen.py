"""A job's resolved configuration, written once. Later edits of its recipe change neither the job nor its requeues."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from pathlib import Path

from rlad_megatron.config import RunConfig
from rlad_megatron.config.recipe import to_yaml

# In the folder of the submission, because all nodes and the container see it. `slurm/job.sh` knows the name too.
SUBMITTED = Path("runs/.submitted")
REPOSITORY = Path(__file__).parents[2]


def freeze(config: RunConfig, file: Path | None = None) -> Path:
    """Write the configuration and the commit of the code, atomically. The file can be given as RECIPE.

    file: None for one that no other submission writes.
    """
    now = time.strftime("%Y%m%d-%H%M%S")
    file = file or SUBMITTED / f"{config.name}-{now}-{secrets.token_hex(3)}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(f"# {time.strftime('%Y-%m-%d %H:%M:%S')}, {code_version()}\n{to_yaml(config)}")
    os.replace(temporary, file)
    return file


def code_version() -> str:
    """The commit of this code and whether the working tree differs from it."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "rlad_megatron", "recipes", "slurm")
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown: no git, or not a clone"
    return f"commit {commit}" + (" with uncommitted changes" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
