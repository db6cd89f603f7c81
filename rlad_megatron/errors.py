"""Errors that the user can fix.

Every message is one line that names the field, the value and the remedy. The command line prints it and exits with
code 2. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re

# What the user can fix: no space, no permission, a failing disk or server.
FILE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
USER_ERROR = 2  # the command's exit code for these errors, except RunComplete


class RladError(ValueError):
    """Base of all errors that the user can fix."""

    exit_code = USER_ERROR


class RunComplete(RladError):
    """The run to resume has nothing left to do. Not a failure, so a requeued job succeeds."""

    exit_code = 0


class RankError(RladError):
    """A fault of the program in a rank. Its traceback is in a log."""

    exit_code = 1


class ConfigError(RladError):
    """A field of the configuration is wrong, by itself or in combination with another."""


class DataError(RladError):
    """A prompt or trace file, or a tokenizer, is missing, malformed or inconsistent."""


class CheckpointError(RladError):
    """A checkpoint (Hugging Face or Megatron) is missing, truncated, or from another model."""


class RolloutError(RladError):
    """A rollout server did not start, did not answer, or died too often."""


class TeacherError(RladError):
    """A teacher on dedicated ranks did not start, did not answer, or exited."""


class WeightSyncError(RladError):
    """The rollout servers' weights differ from the trainer's after a sync."""


class TrainingError(RladError):
    """Training cannot continue, for example after repeated non-finite gradients."""


def file_error(error: BaseException | None, file: object) -> str | None:
    """The file system's error within another one, in words; None if there is none.

    file: named if the error names none. Libraries hide the error in the text or the cause of their own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FILE_ERRORS:
            return f"{error.filename or file}: {error.strerror}"
        found = re.search(r"\[Errno (\d+)\]", str(error))
        if found and int(found[1]) in FILE_ERRORS:
            return f"{file}: {os.strerror(int(found[1]))}"
        error = error.__cause__ or error.__context__
    return None


class StepDropped(Exception):
    """No error: the run was told to stop, and the step at hand did not end in time. Its update has not begun."""
