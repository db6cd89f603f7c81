"""From what the user types to a RunConfig: a recipe by name, file or YAML, and `key=value` overrides."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import ConfigError


def load_run(recipe: str, overrides: list[str]) -> RunConfig:
    """Resolve a recipe with its overrides.

    Args:
        recipe: `recipes/NAME.py` or `NAME` (a module of the `recipes` package with a function of its own name),
            or a YAML file as `rlad show` prints it.
        overrides: `key=value` strings with dotted keys; values are read as YAML.

    Raises:
        ConfigError: no such recipe, an unknown key (the nearest known one is named), or a value of a wrong type.
    """
    return apply_overrides(_load_recipe(recipe), overrides)


def _load_recipe(recipe: str) -> RunConfig:
    if recipe.endswith((".yaml", ".yml")):
        return from_yaml(Path(recipe))
    path = Path(recipe) if recipe.endswith(".py") else _recipes_dir() / f"{recipe}.py"
    if not path.is_file():
        known = recipe_names()
        near = difflib.get_close_matches(recipe, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"recipe {recipe!r} not found; {hint}known: {', '.join(known)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, path.stem):
        raise ConfigError(f"{path}: has no function {path.stem}(); a recipe is a function of its file's name")
    return getattr(module, path.stem)()


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
    tree = _structured(config)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not an override; write key=value, for example train.steps=20")
        try:
            tree.merge_with(OmegaConf.from_dotlist([override]))
        except (ConfigKeyError, ConfigAttributeError):
            raise ConfigError(f"unknown key {key!r}; {_nearest(key)}") from None
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            below = [name for name in known_keys() if name.startswith(f"{key}.")]
            if below:
                raise ConfigError(f"{override}: {key} holds several keys; set one of: {', '.join(below)}") from None
            raise ConfigError(f"{override}: {str(error).splitlines()[0]}") from None
    return _resolve(tree)


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


def known_keys() -> list[str]:
    """Every dotted key of the configuration."""

    def walk(node: dict, prefix: str) -> list[str]:
        keys = []
        for key, value in node.items():
            keys += walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
        return keys

    return walk(OmegaConf.to_container(_structured(RunConfig())), "")


def _nearest(key: str) -> str:
    known = known_keys()
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
        name for name in known if name.rsplit(".", 1)[-1] in difflib.get_close_matches(leaf, [name.rsplit(".", 1)[-1]])
    ]
    return f"did you mean {near[0]!r}?" if near else "`rlad show RECIPE` lists the keys"


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML; `from_yaml` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(path: Path) -> RunConfig:
    """Read a resolved configuration.

    Raises:
        ConfigError: the file is missing, is not YAML, or has an unknown key.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; `rlad show RECIPE > {path.name}` writes one")
    tree = _structured(RunConfig())
    try:
        if not isinstance(yaml.safe_load(path.read_text()), dict):
            raise ConfigError(f"{path}: not a configuration; `rlad show RECIPE > {path.name}` writes one")
        tree.merge_with(OmegaConf.load(path))
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise ConfigError(f"{path}: unknown key {error.full_key!r}; {_nearest(str(error.full_key))}") from None
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    return _resolve(tree)


def _resolve(tree) -> RunConfig:
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}; write ${{...}} only for other keys of the tree") from None
