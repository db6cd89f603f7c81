"""The one reader of config.json. Torch-free."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.known import KNOWN_MODELS, MADE_HERE
from rlad_megatron.models.registry import as_model_spec
from rlad_megatron.models.spec import ModelSpec


def read_model_spec(path: str | Path) -> ModelSpec:
    """The spec of a model, from config.json of its folder.

    Raises:
        CheckpointError: config.json is missing or damaged, or a field is missing, of a wrong type or impossible.
        ConfigError: unknown `model_type`, or a field with a value that is not covered.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: not found; {_how_to_get(path)}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); copy the model again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a JSON object; copy the model again")
    return as_model_spec(config, str(file))


def read_role_spec(role: str, path: str) -> ModelSpec:
    """The spec of the student or the teacher. Raises as `read_model_spec`, naming the field of a missing file."""
    try:
        return read_model_spec(path)
    except CheckpointError as error:
        raise CheckpointError(f"{role}.path={path}: {error}") from None


def read_specs(config: RunConfig) -> dict[str, ModelSpec]:
    """The specs of a run's models by role: "student", and "teacher" if it has one. Raises as `read_role_spec`."""
    return {role: read_role_spec(role, model.path) for role, model in config.models}


def read_or_known_spec(path: str, role: str) -> ModelSpec:
    """The spec from config.json, or that of the known model which the folder is named after.

    role: "student" or "teacher", for the message.

    Raises:
        ConfigError: neither is there, or as `read_model_spec`.
        CheckpointError: as `read_model_spec`.
    """
    name = Path(path).name
    if (Path(path) / "config.json").is_file():
        return read_model_spec(path)
    if name in KNOWN_MODELS:
        return as_model_spec(KNOWN_MODELS[name])
    raise ConfigError(
        f"{role}.path={path}: no config.json there, and {name!r} is not one of the models known by name "
        f"({', '.join(KNOWN_MODELS)}); {_how_to_get(path)}"
    )


@cache
def print_unknown_fields(path: str, spec: ModelSpec) -> None:
    """Print one line if config.json has fields that are on no list. Once for a model in a process."""
    if spec.unknown_fields:
        print(
            f"model {path}: config.json has fields this version does not know: {', '.join(spec.unknown_fields)}; "
            "`rlad convert` from or to Hugging Face compares logits to be sure",
            file=sys.stderr,
            flush=True,
        )


def _how_to_get(path: str | Path) -> str:
    """The remedy for a missing model folder, as the end of a message."""
    script, name = MADE_HERE.get(Path(path).parent.name), Path(path).name
    if script:
        return f"make it with {script}"
    if name not in KNOWN_MODELS:
        return "give a folder in Hugging Face format, with config.json (rlad downloads no models)"
    on_hub = f"{'deepseek-ai' if name.startswith('DeepSeek') else 'Qwen'}/{name}"
    folder = f"models/{name}" if str(path) == on_hub else path
    return f"rlad downloads no models; `hf download {on_hub} --local-dir {folder}`, and give that folder"
