"""From what the user types to a RunConfig: a recipe by name, file or YAML, and `key=value` overrides."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import ConfigError

WANTED = {  # what a field of each type takes, for messages
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple[int, ...]: "a list of whole numbers, for example [2,3]",
    tuple[str, ...]: "a list of texts, for example ['a','b']",
}


def load_run(recipe: str, overrides: list[str]) -> RunConfig:
    """Resolve a recipe with its overrides.

    Args:
        recipe: `recipes/NAME.py` or `NAME` (a module of the `recipes` package with a function of its own name),
            or a YAML file as `rlad show` prints it.
        overrides: `key=value` strings with dotted keys; a list is written as in YAML.

    Raises:
        ConfigError: no such recipe, an unknown key (the nearest known one is named), or a value of a wrong type.
    """
    if recipe.endswith((".yaml", ".yml")):
        return from_yaml(Path(recipe), overrides)
    return apply_overrides(_load_recipe(recipe), overrides)


def _load_recipe(recipe: str) -> RunConfig:
    path = Path(recipe) if recipe.endswith(".py") else _recipes_dir() / f"{recipe}.py"
    if not path.is_file():
        known = recipe_names()
        near = difflib.get_close_matches(recipe, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"recipe {recipe!r} not found; {hint}known: {', '.join(known)}; or a .py or .yaml file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, path.stem):
        raise ConfigError(f"{path}: has no function {path.stem}(); a recipe is a function of its file's name")
    config = getattr(module, path.stem)()
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{path}: {path.stem}() returns {config!r:.40}; a recipe returns a RunConfig")
    return config


def recipe_names() -> list[str]:
    """The recipes that can be given by name."""
    return sorted(file.stem for file in _recipes_dir().glob("*.py") if not file.stem.startswith("_"))


def recipe_purpose(name: str) -> str:
    """The first line of what a recipe says of itself."""
    return (ast.get_docstring(ast.parse((_recipes_dir() / f"{name}.py").read_text())) or "").partition("\n")[0]


def _recipes_dir() -> Path:
    import recipes

    return Path(next(iter(recipes.__path__)))


def apply_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """A new configuration with `key=value` strings applied."""
    tree, kinds = _structured(config), _kinds()
    _override(tree, overrides, kinds)
    return _resolve(tree, kinds)


def _override(tree, overrides: Sequence[str], kinds: dict[str, type]) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not an override; write key=value, for example train.steps=20")
        _set(tree, key, _read(text, kinds.get(key)), kinds)


def _structured(config: RunConfig):
    tree = OmegaConf.structured(config)
    OmegaConf.set_readonly(tree, False)  # frozen dataclasses are read-only; the tree is a copy to edit
    _unlock(tree)
    return tree


def _unlock(node) -> None:
    for key in node:
        child = node._get_node(key)
        if OmegaConf.is_dict(child):
            OmegaConf.set_readonly(child, False)
            _unlock(child)


def _kinds(section: type = RunConfig, prefix: str = "") -> dict[str, type]:
    """The declared type of every dotted key."""
    kinds: dict[str, type] = {}
    for name, kind in typing.get_type_hints(section).items():
        is_section = isinstance(kind, type) and is_dataclass(kind)
        kinds |= _kinds(kind, f"{prefix}{name}.") if is_section else {prefix + name: kind}
    return kinds


def _read(text: str, kind: type | None) -> object:
    """A value as it was typed: lists are YAML, anything else is what it says, but for quotes around it.

    YAML would read the text `no` as false and `007` as a number.
    """
    if typing.get_origin(kind) is tuple:
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # a date that is none is a ValueError
            return text
    if kind is not str:
        text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _set(tree, key: str, value: object, kinds: dict[str, type]) -> None:
    if key not in kinds:
        below = [name for name in kinds if name.startswith(f"{key}.")]
        if below:
            raise ConfigError(f"{key}={_shown(value)}: {key} holds several keys; set one of: {', '.join(below)}")
        raise ConfigError(f"unknown key {key!r}; {_nearest(key, list(kinds))}")
    try:
        OmegaConf.update(tree, key, value)
    except OmegaConfBaseException:
        raise ConfigError(_not_wanted(key, value, kinds)) from None


def _not_wanted(key: str, value: object, kinds: dict[str, type]) -> str:
    wanted, reference = WANTED[kinds[key]], re.search(r"\$\{([\w.]*)", _shown(value))
    if reference is None:
        return f"{key}={_shown(value)} must be {wanted}"
    hint = _nearest(reference[1], [name for name, kind in kinds.items() if kind == kinds[key]])
    return f"{key}={_shown(value)}: ${{...}} must name another key that holds {wanted}; {hint}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _nearest(key: str, known: list[str]) -> str:
    leaf = key.rpartition(".")[2]
    leaves = {name: name.rpartition(".")[2] for name in known}
    near = (
        difflib.get_close_matches(key, [name for name in known if leaves[name] == leaf], n=1, cutoff=0)
        or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        or [name for name in known if difflib.get_close_matches(leaf, [leaves[name]])]
    )
    return f"did you mean {near[0]!r}?" if near and near[0] != key else "`rlad show RECIPE` lists the keys"


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, with models in `models_dir` written so that they follow it; `from_yaml` reads it."""
    tree = _structured(config)
    for model in (tree.student, tree.teacher):
        if model.path.startswith(f"{config.models_dir}/"):
            model.path = "${models_dir}" + model.path.removeprefix(config.models_dir)
    return OmegaConf.to_yaml(tree)


def from_yaml(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration, and apply `key=value` strings before its ${...} are resolved.

    Raises:
        ConfigError: the file is missing, is not YAML, or has an unknown key or a value of a wrong type.
    """
    example = f"`rlad show RECIPE > {path.name}` writes one"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {example}")
    tree, kinds = _structured(RunConfig()), _kinds()
    try:
        content = yaml.safe_load(path.read_text())
        with suppress(OmegaConfBaseException):
            OmegaConf.load(path)  # refuses a key that is there twice
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ConfigError(f"{path}:{line}: not YAML ({error.problem}); mend that line, or the one before") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]}); mend that value") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a configuration; {example}")
    try:
        for key, value in _leaves(content, kinds):
            _set(tree, key, value, kinds)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    _override(tree, overrides, kinds)
    return _resolve(tree, kinds)


def _leaves(content: dict, kinds: dict[str, type], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if "." in str(name):
            raise ConfigError(f"{key!r} is not a key; in a file the parts of a key are nested, one in the other")
        if isinstance(value, dict) and key not in kinds:
            yield from _leaves(value, kinds, f"{key}.")
        else:
            yield key, value


def _resolve(tree, kinds: dict[str, type]) -> RunConfig:
    try:
        return typing.cast(RunConfig, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        values = dict(_leaves(typing.cast(dict, OmegaConf.to_container(tree, resolve=False)), kinds))
        key = error.full_key
        if key not in values:  # inside a list, of which the error does not say which
            key = next(name for name in values if typing.get_origin(kinds[name]) is tuple and "${" in str(values[name]))
        raise ConfigError(_not_wanted(key, values[key], kinds)) from None
