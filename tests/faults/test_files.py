"""Files of a run that are damaged, missing, in use or cannot be written: one line, and the way on."""

import shutil

import pytest
from faults.runs import STUDENT, run

pytestmark = pytest.mark.faults

STEPS = ["checkpoint.every=2", "checkpoint.keep=2", "train.ranks_per_node=1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 4 steps with the checkpoints of steps 2 and 4, and its figures up to step 6."""
    folder = tmp_path_factory.mktemp("whole")
    with run(folder, "short", *STEPS, "train.steps=4") as short:
        assert short.end()[0] == 0
    with run(folder, "long", *STEPS, "train.steps=6") as long:
        assert long.end()[0] == 0
        return folder / "short", figures(long)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "copy")


def figures(run):
    """What a run computed, by step."""
    return {line["step"]: (line["loss/policy"], line["grad_norm"]) for line in run.metrics()}


def newest(copy, pattern):
    return sorted((copy / "checkpoints" / "step_00000004").glob(pattern))[-1]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped byte": (lambda copy: flip(newest(copy, "*.distcp")), ".distcp: damaged: it has another digest"),
    "a cut file": (
        lambda copy: newest(copy, "*.distcp").write_bytes(newest(copy, "*.distcp").read_bytes()[:-9]),
        ".distcp: damaged: it has another digest",
    ),
    "no metadata": (
        lambda copy: newest(copy, "metadata.json").unlink(),
        "metadata.json: not found, though digests.json",
    ),
    "no weights": (lambda copy: newest(copy, "*.distcp").unlink(), ".distcp: not found, though digests.json"),
    "a cut run.json": (lambda copy: newest(copy, "run.json").write_text('{"model": '), "run.json: damaged, JSONDecode"),
    "no digests": (
        lambda copy: newest(copy, "digests.json").unlink(),
        "digests.json: not found, though the checkpoint",
    ),
    "cut digests": (lambda copy: newest(copy, "digests.json").write_text("{"), "digests.json: damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_way_on(copy, whole, name):
    damage, message = DAMAGE[name]
    damage(copy)
    before = sorted(path.name for path in (copy / "checkpoints").iterdir())
    with run(copy.parent, "copy", *STEPS, "train.steps=6", "resume=true") as resumed:
        said = resumed.said()
    assert message in said and said.endswith("resume=true resume_step=2")
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == before
    if name == "a flipped byte":
        with run(copy.parent, "copy", *STEPS, "train.steps=6", "resume=true", "resume_step=2") as resumed:
            code, out, _ = resumed.end()
            assert code == 0 and "resumed after step 2" in out
            assert figures(resumed) == whole[1]
        names = {path.name for path in (copy / "checkpoints").iterdir()}
        assert {"step_00000004.abandoned1", "step_00000004", "step_00000006"} <= names


@pytest.mark.parametrize("content", [None, ""])
def test_without_latest_the_newest_checkpoint_is_taken_and_said(copy, whole, content):
    latest = copy / "checkpoints" / "latest"
    latest.unlink() if content is None else latest.write_text(content)
    with run(copy.parent, "copy", *STEPS, "train.steps=6", "resume=true") as resumed:
        code, out, _ = resumed.end()
        assert code == 0 and "latest names no step: took step_00000004, the newest sound checkpoint" in out
        assert figures(resumed) == whole[1] and latest.read_text() == "6"


def test_a_full_disk_during_a_save_is_named_and_the_last_checkpoint_stays(copy, whole):
    with run(copy.parent, "copy", *STEPS, "train.steps=6", "resume=true", largest_file=4 * 10**6) as full:
        said = full.said()
        assert "checkpoints/step_00000006.tmp: cannot be written (" in said, said
        assert full.left() == []
    assert (copy / "checkpoints" / "latest").read_text() == "4"
    with run(copy.parent, "copy", *STEPS, "train.steps=6", "resume=true") as resumed:
        assert resumed.end()[0] == 0 and figures(resumed) == whole[1]
    assert not list((copy / "checkpoints").glob("*.tmp"))


def test_a_full_disk_at_the_start_is_named_and_blocks_nothing(tmp_path):
    with run(tmp_path, "full", *STEPS, "train.steps=1", largest_file=0) as full:
        assert "No usable temporary directory found" in full.said()
    with run(tmp_path, "full", *STEPS, "train.steps=1", largest_file=1000) as full:
        assert "config.yaml.tmp: File too large" in full.said() or "full: File too large" in full.said()
    with run(tmp_path, "full", *STEPS, "train.steps=1") as started:
        assert started.end()[0] == 0


def test_two_starts_on_one_folder(copy):
    with run(copy.parent, "copy", *STEPS, "train.steps=100000", "resume=true") as first:
        first.wait_for_step(5)
        with run(copy.parent, "copy", *STEPS, "train.steps=100000", "resume=true") as second:
            said = second.said()
        assert "copy is in use by `rlad sft` on " in said and f"(process {first.process.pid}) since " in said
        first.process.kill()
        first.process.wait()
        with run(copy.parent, "copy", *STEPS, "train.steps=100000", "resume=true") as third:
            third.wait_for_step(6)


def test_a_run_whose_lock_is_taken_leaves_the_folder_to_the_other(copy):
    with run(copy.parent, "copy", "checkpoint.every=0", "train.steps=100000", "resume=true") as slow:
        slow.wait_for_step(5)
        before = sorted((path.name, path.stat().st_mtime_ns) for path in (copy / "checkpoints").rglob("*"))
        (copy / "other").write_text('{"token": "another"}')
        (copy / "other").replace(copy / "lock")
        assert slow.said() == f"rlad: another process has taken {copy / 'lock'}; this one ends"
        assert slow.left() == []
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in (copy / "checkpoints").rglob("*"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_model_whose_files_are_no_text(tmp_path, name):
    student = shutil.copytree(STUDENT, tmp_path / "student")
    (student / name).write_bytes(b"\xff\xfe{}")
    with run(tmp_path / "runs", "x", *STEPS, f"student.path={student}") as started:
        assert f"{student / name}: not " in started.said()
