"""The types of configuration fields: what a value may be, and the words for it.

The string that ends an alias, or the message of a ValueError, completes "FIELD=VALUE ..." in an error
(config/messages.py).
"""

import os
import re
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from rlad_megatron.config.objectives import OBJECTIVES

CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)

T = TypeVar("T")


def doc(default: T, description: str) -> T:
    """A field's default with its description."""
    return Field(default, description=description)


def _read_flag(value: object) -> object:
    # Stricter than pydantic, which takes yes, on and 1 too.
    return {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value


def _read_list(value: object) -> object:
    try:
        return yaml.load(value, yaml.BaseLoader) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def _read_map(value: object) -> object:
    """A mapping as typed on the command line, with YAML's types."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def _asks(template: str) -> str:
    if template and "{prompt}" not in template:
        raise ValueError("does not say where the question goes; write {prompt} there")
    return template


def _written_out(text: str) -> str:
    # `${key}` is replaced when a run is loaded (config/recipe.py).
    if found := re.match(r"~|.*?(\$\w)", text):
        # Expanding here would be wrong: a job's container may have another home folder.
        expanded = os.path.expandvars(os.path.expanduser(text))
        remedy = f"write it out: {expanded}" if expanded != text else "write it out"
        raise ValueError(f"has a {'$' if found[1] else '~'}, which is not expanded here; {remedy}")
    return text


def _known_objective(name: str) -> str:
    if name not in OBJECTIVES:
        raise ValueError(f"is unknown; choose one of: {', '.join(OBJECTIVES)}")
    return name


Flag = Annotated[bool, Field(strict=True), BeforeValidator(_read_flag), "must be true or false"]
Count = Annotated[int, Field(ge=1), "must be at least 1"]
NonNegativeInt = Annotated[int, Field(ge=0), "must not be negative"]
SleepLevel = Annotated[int, Field(ge=0, le=2), "is outside [0, 2]"]
Port = Annotated[int, Field(ge=1, le=65535), "is outside [1, 65535]"]
Positive = Annotated[float, Field(gt=0), "must be a number above 0"]
NonNegative = Annotated[float, Field(ge=0), "must not be negative"]
AtLeastOne = Annotated[float, Field(ge=1), "must be at least 1"]
Share = Annotated[float, Field(ge=0, le=1), "is outside [0, 1]"]
PositiveShare = Annotated[float, Field(gt=0, le=1), "must be above 0 and at most 1; for 90% write 0.9"]
Text = Annotated[str, AfterValidator(_written_out)]
FolderName = Annotated[
    Text, Field(pattern=r"^\.*[^/.][^/]*$"), "must be a folder name; runs_dir says where the folder goes"
]
ObjectiveName = Annotated[str, AfterValidator(_known_objective)]
People = Annotated[
    tuple[Annotated[int, Field(ge=2, le=8)], ...],
    Field(min_length=1),
    BeforeValidator(_read_list),
    "must be a list of whole numbers from 2 to 8, for example [2,3]",
]
Steps = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    BeforeValidator(_read_list),
    "must be a list of steps from 1 on, for example [3,4]",
]
Ranks = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    BeforeValidator(_read_list),
    "must be a list of ranks, for example [0,1]",
]
RecomputeModules = Annotated[
    tuple[Literal["core_attn", "mlp", "moe", "moe_act", "layernorm"], ...],
    BeforeValidator(_read_list),
    "must be a list of core_attn, mlp, moe, moe_act and layernorm, for example [moe_act]",
]
Urls = Annotated[
    tuple[Annotated[Text, Field(pattern=r"^http://[^/:\s]")], ...],
    BeforeValidator(_read_list),
    "must be a list of server addresses, for example ['http://HOST:PORT']",
]
Columns = Annotated[
    dict[str, str],
    BeforeValidator(_read_map),
    "must be a mapping from our names to columns, for example {prompt: question, answer: reward_model.ground_truth}",
]
TemplateKwargs = Annotated[
    dict[str, Any],
    BeforeValidator(_read_map),
    "must be a mapping from names in the chat template to values, for example {enable_thinking: false}",
]
Template = Annotated[str, AfterValidator(_asks)]
