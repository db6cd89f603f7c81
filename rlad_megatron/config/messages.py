"""Errors of configuration fields as one line: field, value as typed, what it must be."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlad_megatron.config import tree as sections
from rlad_megatron.config.tree import RunConfig
from rlad_megatron.errors import ConfigError

Problems = dict[str, object]  # message -> whether it applies; the first that does becomes a ConfigError
TYPES = {int: "a whole number", float: "a number", str: "text"}


def config_error(error: ValidationError, above: str = "", given: dict[str, Any] | None = None) -> ConfigError:
    """The first problem that a section's constructor found.

    Args:
        above: the section's key and a dot.
        given: all values as typed, by dotted key; None in a recipe, where the name of the class stands for the section.
    """
    section: Any = getattr(sections, error.title, None)
    if section is None:  # of a study
        first = error.errors(include_url=False)[0]
        place, *inner = first["loc"]
        where = ".".join(map(str, (error.title, f"argument {place + 1}" if isinstance(place, int) else place, *inner)))
        said = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
        return ConfigError(f"{where}={shown(first['input'])}: {said[0].lower()}{said[1:]}")
    if not given and section is not RunConfig:
        above = f"{error.title}."
    first = error.errors(include_url=False)[0]
    name = first["loc"][0]
    if isinstance(name, int):  # a positional argument
        name = fields(section)[name].name
    key, hint = above + name, {field.name: field.type for field in fields(section)}.get(name)
    value = given[key] if given else first["input"]
    if hint is None or is_dataclass(hint):
        return wrong_key(key, value, list(keys(section, above)))
    return ConfigError(f"{key}={shown(value)} {_complaint(hint, first)}")


def _complaint(hint: Any, error: ErrorDetails) -> str:
    """What is wrong with a field's value. hint: the field's type; Annotated, unless it is a Literal."""
    kind = error["type"]
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "finite_number":
        return "must be a finite number"
    if get_origin(hint) is Literal:
        return f"is unknown; choose one of: {', '.join(get_args(hint))}"
    if kind.endswith(("_parsing", "_type", "_from_float")) and hint.__origin__ in TYPES:
        return f"must be {TYPES[hint.__origin__]}"
    return hint.__metadata__[-1]


def wrong_key(key: str, value: object, known: list[str]) -> ConfigError:
    """For a key that is unknown, or that names a section."""
    below = [name for name in known if name.startswith(f"{key}.")]
    if below:
        return ConfigError(f"{key}={shown(value)}: {key} is a section; set one of its keys: {', '.join(below)}")
    return ConfigError(f"unknown key {key!r}; {nearest(key, known)}")


def keys(section: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all fields in a section."""
    for field in fields(section):
        key = prefix + field.name
        yield from keys(field.type, f"{key}.") if is_dataclass(field.type) else (key,)


def nearest(key: str, known: list[str]) -> str:
    """A hint that names the known key most like an unknown one: the same last part first, then the same whole."""
    leaf = key.rpartition(".")[2]
    leaves = {name: name.rpartition(".")[2] for name in known}
    near = (
        difflib.get_close_matches(key, [name for name in known if leaves[name] == leaf], n=1, cutoff=0)
        or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        or [name for name in known if difflib.get_close_matches(leaf, [leaves[name]])]
    )
    return f"did you mean {near[0]!r}?" if near else "`rlad show RECIPE` lists the keys"


def shown(value: object) -> str:
    """A value as the user would type it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return value if isinstance(value, str) else json.dumps(value, default=repr)
