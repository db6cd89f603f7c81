"""Read the configuration of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.known import how_to_get
from rlad_megatron.models.registry import family_for


def load_hf_config(path: str | Path):
    """Read `config.json` of a Hugging Face folder.

    Raises:
        CheckpointError: the folder or its config.json is missing or is not JSON.
        ConfigError: the model_type is unknown, or the model uses an option that its family does not cover.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    file = Path(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: not found; {how_to_get(path)}")
    try:
        raw = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); copy the model again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: not a JSON object; copy the model again")
    family_for(SimpleNamespace(**{"model_type": None, **raw}))  # before transformers, whose error would list hundreds
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except StrictDataclassError as error:  # a field of a wrong type
        raise CheckpointError(f"{file}: {' '.join(str(error).split())}; copy the model again") from error
