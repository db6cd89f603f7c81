"""What the documentation's site has beside docs/ (a hook of mkdocs, see mkdocs.yml).

The configuration reference is made from `config/tree.py`. README, CHANGELOG and CONTRIBUTING are pages too. Links are
written as they work in the repository, and are resolved here.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import TypeAdapter

from rlad_megatron.config import RunConfig

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
WITHOUT = {"index.md": ["navigation", "toc"], "coming-from.md": ["navigation"]}  # columns that these pages do without
REFERENCE = "configuration.md"
# [text](path), without the anchor: what follows a "#" is mkdocs' to check.
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s#:]+)(#[^()\s]*)?\)")

INTRODUCTION = """# Configuration

Every field of a run, made from `rlad_megatron/config/tree.py`. On the command line a field is set by its key,
`rlad train RECIPE rollout.group_size=16`; in a recipe it is a dataclass field, in YAML a nested key. `rlad show RECIPE`
prints the values that a recipe sets. An unknown key or a value that does not fit is refused in one line.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    files.append(File.generated(config, REFERENCE, content=configuration_reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolves links that are relative to the page's place in the repository, and sets what the page hides."""
    page.meta["hide"] = WITHOUT.get(page.file.src_uri, [])
    folder = "" if page.file.src_uri in ROOT_PAGES.values() else posixpath.join("docs", page.file.src_uri, "..")
    return LINK.sub(lambda link: _resolved(link, folder), markdown)


def _resolved(link: re.Match[str], folder: str) -> str:
    text, target, anchor = link.groups()
    path = posixpath.normpath(posixpath.join(folder, target))
    if path in ROOT_PAGES:
        return f"[{text}]({ROOT_PAGES[path]}{anchor or ''})"
    if path.startswith("docs/"):  # all pages are in one folder
        return f"[{text}]({path.removeprefix('docs/')}{anchor or ''})"
    if (ROOT / path).exists():  # code: the site has none
        return f"`{path}`" if text.strip("`/") == path else f"{text} (`{path}`)"
    return link[0]  # mkdocs says that it leads nowhere


def configuration_reference() -> str:
    """The page of all fields: key, type or choices, default, description."""
    schema = TypeAdapter(RunConfig).json_schema()
    return INTRODUCTION + "\n".join(_sections("", schema, schema["$defs"], asdict(RunConfig())))


def _sections(key: str, schema: dict[str, Any], types: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The part of the field `key` and those below it. `values`: the defaults, which may differ from the type's."""
    lines = [f"\n## {key or 'Run'}\n" if key.count(".") == 0 else f"\n### {key}\n", _linked(schema["description"]), ""]
    below: list[str] = []
    lines += ['<div class="fields" markdown>\n', "| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        path = f"{key}.{name}".removeprefix(".")
        if "$ref" in field:
            below += _sections(path, types[field["$ref"].rpartition("/")[2]], types, values[name])
            continue
        default = yaml.safe_dump(values[name], default_flow_style=True).removesuffix("...\n").strip()
        cells = f"[`{name}`](#{path}){{ #{path} }}", _kind(field), f"`{default}`", _linked(field.get("description", ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, "\n</div>", *below]


def _kind(field: dict[str, Any]) -> str:
    """A field's type and range, from its JSON schema."""
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    names = {
        "integer": "integer",
        "number": "number",
        "boolean": "true or false",
        "string": "text",
        "object": "mapping",
    }
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    bounds = [f"{sign} {field[bound]:g}" for bound, sign in signs.items() if bound in field]
    return " ".join([names.get(field["type"], field["type"]), ", ".join(bounds)]).strip()


def _linked(description: str) -> str:
    description = description.replace("[", "\\[").replace("{", "&#123;")  # [a][b] would be a reference, {a} attributes
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", description)
