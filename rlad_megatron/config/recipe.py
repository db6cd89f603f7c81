"""From what the user types to a RunConfig: a recipe by name or file, or a YAML file, and `key=value` overrides."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import ValidationError

from rlad_megatron.config.messages import config_error, keys, nearest, shown, wrong_key
from rlad_megatron.config.tree import RunConfig
from rlad_megatron.errors import ConfigError

T = TypeVar("T")


def _maps(section: Any = RunConfig, above: str = "") -> Iterator[str]:
    for field in fields(section):
        key = above + field.name
        if is_dataclass(field.type):
            yield from _maps(field.type, f"{key}.")
        elif get_origin(getattr(field.type, "__origin__", None)) is dict:
            yield key


MAPS = frozenset(_maps())  # keys whose values are mappings


def load_run(recipe: str, overrides: list[str]) -> RunConfig:
    """Resolve a recipe with its overrides.

    Args:
        recipe: `recipes/NAME.py` or `NAME` (a module of the `recipes` package with a function of the same name),
            or a YAML file as `rlad show` prints it.
        overrides: `key=value` strings with dotted keys; lists and mappings are written as in YAML, and a name of a
            mapping also as a key: data.columns.prompt=question.

    Raises:
        ConfigError: no such recipe, one that fails, an unknown key (the message names the nearest known one), or a
            wrong value.
    """
    if recipe.endswith((".yaml", ".yml")):
        return from_yaml(Path(recipe), overrides)
    return apply_overrides(call_file("recipe", recipe, _recipes_dir(), RunConfig, "a .py or .yaml file"), overrides)


def call_file(noun: str, name: str, folder: Path, kind: type[T], or_else: str = "a .py file") -> T:
    """What the function with its file's name returns.

    Args:
        noun: what it is, "recipe" or "study".
        name: of a file in `folder`, without ".py"; or the path of a file, with it.
        kind: what the function must return.
        or_else: what else `name` may be, for the error.

    Raises:
        ConfigError: no such file or function, one that fails, or that returns something else.
    """
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        known = function_names(folder)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{noun} {name!r} not found; {hint}known: {', '.join(known)}; or {or_else}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, path.stem):
            raise ConfigError(f"{path}: has no function {path.stem}(); a {noun} is a function with its file's name")
        made = getattr(module, path.stem)()
    except ValidationError as error:
        raise ConfigError(f"{path}: {config_error(error)}") from None
    except ConfigError:
        raise
    except Exception as error:  # of any kind: it is the user's code
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        *_, line = [getattr(error, "lineno", "?"), *(frame.lineno for frame in frames)]
        said = " ".join(str(error).split())
        raise ConfigError(f"{path}:{line}: {type(error).__name__}: {said}; fix that line") from None
    if not isinstance(made, kind):
        raise ConfigError(f"{path}: {path.stem}() returns {made!r:.40}; a {noun} returns a {kind.__name__}")
    return made


def function_names(folder: Path) -> list[str]:
    """Recipes or studies that can be given by name."""
    return sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))


def recipe_names() -> list[str]:
    """Recipes that can be given by name."""
    return function_names(_recipes_dir())


def recipe_purpose(name: str) -> str:
    """The first line of a recipe's docstring."""
    return (ast.get_docstring(ast.parse((_recipes_dir() / f"{name}.py").read_text())) or "").partition("\n")[0]


def _recipes_dir() -> Path:
    import recipes

    return Path(next(iter(recipes.__path__)))


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A new configuration with `key=value` strings applied and each ${key} replaced."""
    return from_tree(asdict(config), overrides)


def from_yaml(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration, and apply `key=value` strings before each ${key} is replaced.

    Raises:
        ConfigError: the file is missing or is not YAML; an unknown key or a wrong value in it or in an override.
    """
    tree = _read_yaml(path)
    try:
        from_tree(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return from_tree(tree, overrides)


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML for `from_yaml`. Models in `models_dir` are written so that they follow it."""
    tree = asdict(config)
    for model in (tree["student"], tree["teacher"]):
        if model["path"].startswith(f"{config.models_dir}/"):
            model["path"] = "${models_dir}" + model["path"].removeprefix(config.models_dir)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def from_tree(tree: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in nested dicts, whose values may be text as the user typed it, with `key=value` strings.

    Raises:
        ConfigError: an unknown key, a value that its field refuses, or a ${key} that names nothing.
    """
    values = by_key(asdict(RunConfig())) | by_key(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not an override; write key=value, for example train.steps=20")
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        if mapping := next((name for name in MAPS if key.startswith(f"{name}.")), None):
            value = text[1:-1] if quoted else _typed(key, text)
            values[mapping] = {**_typed(mapping, values[mapping]), key.removeprefix(f"{mapping}."): value}
        else:
            values[key] = text[1:-1] if quoted else text
    known = list(keys())
    for key, value in values.items():
        if key not in known:
            raise wrong_key(key, value, known)
    return _section(RunConfig, values, "")


def _typed(key: str, value: Any) -> Any:
    """A value of a mapping, or a mapping, as YAML reads what the user typed."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        raise ConfigError(f"{key}={shown(value)}: not YAML; put it in quotes") from None


def by_key(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted key."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = above + name
        if "." in name:
            raise ConfigError(f"{key!r} is not a key; in a file the parts of a key are nested")
        inner = value and isinstance(value, dict) and key not in MAPS
        values |= by_key(value, f"{key}.") if inner else {key: value}
    return values


def _section(kind: Any, values: dict[str, Any], above: str) -> Any:
    """The section of the tree whose keys begin with `above`."""
    arguments = {}
    for field in fields(kind):
        key, inner = above + field.name, is_dataclass(field.type)
        arguments[field.name] = (
            _section(field.type, values, f"{key}.") if inner else _resolved(values[key], values, (key,))
        )
    try:
        return kind(**arguments)
    except ValidationError as error:
        raise config_error(error, above, values) from None


def _resolved(value: Any, values: dict[str, Any], via: tuple[str, ...]) -> Any:
    """The value of the last key in `via` with each ${key} replaced by that key's value."""
    if isinstance(value, list | tuple):
        return [_resolved(item, values, via) for item in value]
    if isinstance(value, dict):
        return {name: _resolved(item, values, via) for name, item in value.items()}

    def at(match: re.Match[str]) -> str:
        name = match[1]
        if not match[2] or name in via or name not in values:
            hint = nearest(name, [known for known in keys() if known not in (via[-1], name)])
            raise ConfigError(f"{via[-1]}={shown(value)}: ${{...}} must name another key; {hint}")
        return shown(_resolved(values[name], values, (*via, name)))

    return re.sub(r"\$\{([^}]*)(\}?)", at, value) if isinstance(value, str) else value


class _Loader(yaml.BaseLoader):
    """A scalar is text, because its field's type decides what it means, or None. Refuses duplicate keys."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str | None:
        return None if node.style is None and node.value in ("", "null") else node.value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            if name in mapping:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {name}", problem_mark=key.start_mark)
            mapping[name] = self.construct_object(value, deep)
        return mapping


def _read_yaml(path: Path) -> dict[str, Any]:
    example = f"`rlad show RECIPE > {path.name}` writes one"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {example}")
    try:
        content = _with_maps(yaml.load(path.read_text(), _Loader), path.read_text())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ConfigError(f"{path}:{line}: not YAML ({error.problem}); fix that line, or the one before") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]}); fix that value") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a configuration; {example}")
    return content


def _with_maps(content: Any, text: str) -> Any:
    """The content of a file with the values of mappings read by YAML's rules: no field says what they mean."""
    for section, name in (key.split(".") for key in MAPS):
        inner = content.get(section) if isinstance(content, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get(name), dict):
            inner[name] = yaml.safe_load(text)[section][name]
    return content
