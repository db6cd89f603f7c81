"""Errors that a user can act on.

Every message is one line that names the field, the value and the remedy.
The command line prints it and exits with code 2; anything else is a bug and keeps its traceback.
"""

USER_ERROR = 2  # the command's exit code for them


class RladError(ValueError):
    """Base of all errors that the user can fix."""


class ConfigError(RladError):
    """A field of the run's configuration is wrong, by itself or together with another."""


class DataError(RladError):
    """A prompt or trace file, or a tokenizer, is missing, malformed or inconsistent."""


class CheckpointError(RladError):
    """A checkpoint (Hugging Face or Megatron) is missing, truncated, or of another model."""


class RolloutError(RladError):
    """A rollout server did not start, did not answer, or died too often."""


class TeacherError(RladError):
    """A teacher on ranks of its own did not start, did not answer, or ended."""


class WeightSyncError(RladError):
    """The rollout engine's weights differ from the trainer's after a sync."""


class TrainingError(RladError):
    """Training cannot go on, for example after repeated non-finite gradients."""
