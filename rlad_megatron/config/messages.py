"""Errors of configuration fields as one line: field, value as typed, what it must be."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlad_megatron.config import tree as sections
from rlad_megatron.config.tree import RunConfig
from rlad_megatron.errors import ConfigError

Problems = dict[str, object]  # message -> whether it applies; the first that does becomes a ConfigError
TYPES = {int: "a whole number", float: "a number", str: "text"}


def config_error(error: ValidationError, given: dict[str, Any] | None = None) -> ConfigError:
    """The first problem that a constructor of config/tree.py found.

    Args:
        error: what `RunConfig(**given)` raised, or a section's constructor in a recipe, where the name of the class
            stands for the section.
        given: the whole tree as typed; None in a recipe.
    """
    root = getattr(sections, error.title)
    names = [] if root is RunConfig else [error.title]
    known = list(keys(root, "".join(f"{name}." for name in names)))
    first = error.errors(include_url=False)[0]
    hint: Any = root
    value: Any = given
    for part in first["loc"]:
        if not is_dataclass(hint):
            break  # an item of a list
        name = fields(hint)[part].name if isinstance(part, int) else part  # int: a positional argument
        names.append(name)
        hint = get_type_hints(hint, include_extras=True).get(name)
        value = value[name] if given else first["input"]
    while isinstance(value, dict) and value and not is_dataclass(hint):  # a key below the last that is known
        name, value = next(iter(value.items()))
        names.append(name)
        hint = None
    key = ".".join(names)
    if hint is None and key in known:
        return ConfigError(f"{key!r} is not a key; in a file the parts of a key are nested")
    if hint is None:
        return ConfigError(f"unknown key {key!r}; {nearest(key, known)}")
    if is_dataclass(hint):
        return not_a_section(key, value, known)
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


def not_a_section(key: str, value: object, known: Iterable[str]) -> ConfigError:
    below = ", ".join(name for name in known if name.startswith(f"{key}."))
    return ConfigError(f"{key}={shown(value)}: {key} is a section; set one of its keys: {below}")


def keys(section: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all fields in a section."""
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


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
