"""The documentation's site: it builds strictly, works offline, and says of the configuration what is true."""

import argparse
import dataclasses
import html
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from site_pages import on_page_markdown

from rlad_megatron.cli import _parser
from rlad_megatron.config import RunConfig

ROOT = Path(__file__).parents[2]
OPEN_ENDED = ("data.columns.", "data.chat_template_kwargs.")  # mappings: the names below are the user's
OTHERS = {"checkpoint.pretrained_checkpoint"}  # Megatron-Bridge's
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


def build(config: Path, site: Path) -> str:
    """What a strict build says if something is wrong; empty if nothing is."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.stdout + done.stderr if done.returncode else ""


def keys(config: type = RunConfig, prefix: str = ""):
    """Every field of the tree: its key and its description."""
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, config.__pydantic_fields__[field.name].description


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    assert build(ROOT / "mkdocs.yml", folder) == ""
    return folder


def test_pages_fetch_nothing_from_elsewhere(site):
    pages = {page.name: page.read_text() for page in site.glob("*.html")}
    assert {"index.html", "tutorial.html", "readme.html", "configuration.html", "api.html"} <= pages.keys()
    fetched = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\s>]*")
    assert {name: found for name, text in pages.items() if (found := fetched.findall(text))} == {}


def test_commands_and_errors_are_shown_as_code(site):
    """A block that is indented too little below a list becomes text."""
    texts = {page.name: re.sub("</?code>", "", page.read_text()) for page in site.glob("*.html")}
    assert {name: found for name, text in texts.items() if (found := re.findall("<p>(?:\\$ |rlad: ).*", text))} == {}


def test_configuration_page_has_every_field_with_its_description(site):
    page = (site / "configuration.html").read_text()
    found = re.findall(r'<tr>\s*<td><a [^>]*?id="([^"]+)"(.*?)</tr>', page, re.S)
    rows = {key: html.unescape(re.sub("<[^>]*>", "", rest)) for key, rest in found}
    assert rows.keys() == {key for key, _ in keys()}
    without = [key for key, description in keys() if not description]
    assert not without, f"give them a doc(...) in config/tree.py: {without}"
    for key, description in keys():
        assert re.sub("docs/|`", "", description) in rows[key].replace("docs/", ""), key


def test_api_page_has_the_comments_of_fields(site):
    page = html.unescape((site / "api.html").read_text())
    assert "what the model sees, chat template included" in page  # Prompt.tokens
    assert "By model_type of config.json." in re.sub("</?code>", "", page)  # FAMILIES


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("[gone](gone.md)", "'gone.md', but the target is not found"),
        ("[no anchor](other.md#nowhere)", "does not contain an anchor '#nowhere'"),
        ("[the source](../tools/gone.py)", "'../tools/gone.py', but the target is not found"),
        ("", "not included in the \"nav\""),
    ],
)  # fmt: skip
def test_a_strict_build_refuses(page, complaint, tmp_path):
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)
    kept = {"site_name": "x", "validation": config["validation"], "docs_dir": "docs", "theme": {"name": "mkdocs"}}
    nav = [{"index": "index.md"}, *([{"other": "other.md"}] if page else [])]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(kept | {"nav": nav, "plugins": []}))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Index\n\n{page}\n")
    (tmp_path / "docs/other.md").write_text("# Other\n")
    assert complaint in build(tmp_path / "mkdocs.yml", tmp_path / "site")


@pytest.mark.parametrize(
    ("source", "link", "resolved"),
    [
        ("operations.md", "[README](../README.md#start)", "[README](readme.md#start)"),
        ("readme.md", "[data](docs/data.md#columns)", "[data](data.md#columns)"),
        ("readme.md", "![demo](docs/images/demo.png)", "![demo](images/demo.png)"),
        ("readme.md", "[slurm/site.sh](slurm/site.sh)", "`slurm/site.sh`"),
        ("data.md", "[times](../benchmarks/results/data.json)", "times (`benchmarks/results/data.json`)"),
        ("data.md", "[gone](../benchmarks/gone.json)", "[gone](../benchmarks/gone.json)"),
        ("data.md", "[method](method.md), [paper](https://arxiv.org)", "[method](method.md), [paper](https://arxiv.org)"),
    ],
)  # fmt: skip
def test_links_of_the_repository_are_links_of_the_site(source, link, resolved):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=source), meta={})
    assert on_page_markdown(link, page, None, None) == resolved


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_fields_and_commands_that_a_page_names_exist(page):
    text = page.read_text()
    if page.name == "coming-from.md":  # the last column is ours
        text = "\n".join(row.split("|")[-2] for row in text.splitlines() if row.startswith("|"))
    known = {key for key, _ in keys()}
    groups = {group for key in known for group in (key, key.rpartition(".")[0])}
    sections = "|".join(RunConfig.__dataclass_fields__)
    named = re.findall(rf"(?<![\w/.=])((?:{sections})\.[a-z][\w.]*\w)(?=[=`\s,;])", text)
    wrong = {name for name in named if name not in groups and not name.startswith(OPEN_ENDED)}
    assert wrong - OTHERS == set()
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(re.findall(r"(?:^|`|    )(?:\$ )?rlad ([a-z]+)", text, re.M)) <= set(commands.choices)
