"""Digests of a checkpoint's files, and names that must stay inside its folder."""

import json
from pathlib import Path

import pytest
from blake3 import blake3

from rlad_megatron.errors import CheckpointError
from rlad_megatron.models import checkpoint_files
from rlad_megatron.models.checkpoint_files import (
    DIGESTS,
    check_undamaged,
    digests_of,
    file_in,
    find_damage,
    read_digests,
    write_digests,
)

FILES = {"a.distcp": b"weights" * 1000, "b.distcp": b"", "run.json": b"{}"}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "BUFFER_BYTES", 1000)  # files of several, the last one not full
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    write_digests(tmp_path, digests_of(tmp_path, FILES), source={"x": "1"})
    return tmp_path


def test_the_digests_are_blake3(checkpoint):
    assert read_digests(checkpoint) == {name: blake3(content).hexdigest() for name, content in FILES.items()}
    assert read_digests(checkpoint, "source") == {"x": "1"}
    sizes = []
    digests_of(checkpoint, FILES, sizes.append)
    assert sorted(sizes) == sorted(map(len, FILES.values()))
    assert find_damage(checkpoint) is None


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_damage_names_its_file(checkpoint, name):
    file = checkpoint / name
    before = file.read_bytes()
    flipped = bytes([*before[:-1], before[-1] ^ 4]) if before else b"x"
    for content in (flipped, before + b"\0", before[:-1] or None):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        assert find_damage(checkpoint).startswith(f"{file}: ")
        # Of processes that share the files, one finds damage, and all find that a file is gone.
        found = sum(find_damage(checkpoint, (process, 2)) is not None for process in (0, 1))
        assert found == (1 if file.exists() else 2)
    file.unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=f"^{file}: .*not found.*; copy the checkpoint again$"):
        check_undamaged(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": []}', '{"files": {"../a": "0"}}', "\udcff"])
def test_damaged_digests_are_named(checkpoint, content):
    (checkpoint / DIGESTS).write_text(content, errors="surrogateescape")
    assert find_damage(checkpoint).startswith(f"{checkpoint / DIGESTS}: ")


def test_without_digests_nothing_is_claimed(tmp_path):
    assert find_damage(tmp_path) is None and read_digests(tmp_path) == {}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", 7, None, ["x"]])
def test_only_names_of_files_next_to_the_list_are_followed(name):
    with pytest.raises(CheckpointError, match="^list: .* is not the name of a file next to it"):
        file_in(Path("folder"), name, Path("list"))
    assert file_in(Path("folder"), "a.b-0", Path("list")) == Path("folder/a.b-0")


def test_json_is_for_people_too(checkpoint):
    assert list(json.loads((checkpoint / DIGESTS).read_text())) == ["files", "source"]
