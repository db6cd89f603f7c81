"""A run's temporary folder: it marks the run's processes, and neither outlives the owner."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import pytest
from processes import children

from rlad_megatron.launch import scratch as module
from rlad_megatron.launch.scratch import scratch
from rlad_megatron.processes import SESSION, start_of

SLEEP = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"]
# Ignores what can be ignored, and takes another session; its environment is that of its start.
STUBBORN = "import os, signal, time; signal.signal(15, 1); os.setsid(); print(os.getpid(), flush=True); time.sleep(600)"
OWNER = f"""
import subprocess, sys, time
from pathlib import Path
from rlad_megatron.launch.scratch import scratch
with scratch([Path("file")]) as folder:
    Path("file").touch()
    child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE, text=True)
    print(folder, child.stdout.readline(), end="", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def tmp(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's is too long for sockets
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(module, "GRACE_S", 0.5)
        yield Path(folder)
    tempfile.tempdir = None


@pytest.fixture
def hidden():
    """The leader of a session that only its number marks: vLLM writes its title over its environment."""
    process = subprocess.Popen(SLEEP, stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def owner(tmp):
    """(a process that owns a scratch folder, the folder, a child of it)."""
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=tmp,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    folder, pid = process.stdout.readline().split()
    yield process, Path(folder), psutil.Process(int(pid))
    process.kill()
    process.wait()


def watcher(process):
    (found,) = children(process.pid, module.__name__)
    return found


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def wait_for(what):
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_started_within_ends_with_it(tmp):
    file, link, target = (tmp / name for name in ("file", "link", "target"))
    target.touch()
    link.symlink_to(target)  # somebody else's, under a name that can be foreseen
    with scratch([file, link]) as folder:
        file.touch()
        assert tempfile.gettempdir() == str(folder) and folder.parent == tmp and folder.stat().st_mode & 0o777 == 0o700
        Path(tempfile.mkstemp()[1]).write_text("left")
        child = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
        child = psutil.Process(int(child.stdout.readline()))
    assert is_gone(child)
    assert list(tmp.iterdir()) == [target] and tempfile.gettempdir() == str(tmp)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_an_owner_that_is_killed_takes_it_with_it(owner, tmp, is_stopped):
    process, folder, child = owner
    if is_stopped:
        child.suspend()
    watching = watcher(process)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # which the whole group gets
        watching.send_signal(signum)
    process.kill()
    wait_for(lambda: not folder.exists())
    assert is_gone(child) and not (tmp / "file").exists()


def test_the_next_start_removes_what_a_killed_watcher_left(owner, tmp):
    process, folder, child = owner
    watcher(process).kill()
    process.kill()
    process.wait()
    assert folder.exists() and not is_gone(child)
    with scratch():
        assert not folder.exists() and is_gone(child) and not (tmp / "file").exists()


def test_the_folder_of_a_living_owner_stays(owner):
    _, folder, child = owner
    with scratch():
        assert folder.exists() and not is_gone(child)


def test_processes_of_a_session_that_hides_its_environment(hidden):
    with scratch() as folder:
        (folder / SESSION.format(hidden.pid, start_of(hidden.pid))).touch()
    hidden.wait(1)


def test_a_process_that_has_the_number_of_an_ended_session_lives(hidden):
    with scratch() as folder:
        (folder / SESSION.format(hidden.pid, start_of(hidden.pid) - 1)).touch()
    assert hidden.poll() is None


def test_a_process_that_is_older_than_the_session_lives(hidden):
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        (folder / SESSION.format(hidden.pid, start_of(hidden.pid) + 1)).touch()
        patch.setattr(module, "start_of", lambda pid: None)  # its leader has ended
        assert module.processes_of(folder) == []


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({"host": "n7", "machine": ["another", "pid:[1]"]}, True),  # which shares the folder above
        ({"machine": ["an earlier boot", "pid:[1]"]}, False),
        ({"namespace": "pid:[1]"}, True),  # a container
        ({}, False),
    ],
)
def test_only_folders_of_this_host_are_removed(tmp, hidden, changes, stays):
    with scratch() as folder:
        owner = json.loads((folder / "owner").read_text())
    if namespace := changes.pop("namespace", None):
        changes["machine"] = [owner["machine"][0], namespace]
    dead = tmp / "rlad_1_2_dead"
    dead.mkdir()
    (dead / "owner").write_text(json.dumps(owner | changes))
    (dead / "files").write_text(f"{tmp / 'file'}\n")
    (tmp / "file").touch()
    (dead / SESSION.format(hidden.pid, start_of(hidden.pid))).touch()
    with scratch():
        pass
    assert dead.exists() == (tmp / "file").exists() == stays
    assert (hidden.poll() is None) == bool(changes)  # numbers mean something only here, since the boot


def test_a_temporary_folder_that_is_too_long_for_sockets_is_not_used(tmp, monkeypatch):
    long = tmp / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    tempfile.tempdir = None
    with scratch() as folder:
        assert folder.parent == Path("/tmp") and len(f"{folder}/{uuid.uuid4()}") <= 107
    assert not folder.exists() and not list(long.iterdir())


def test_other_folders_with_such_names_stay(tmp):
    for name in ("rlad_ranks_x1", "rlad_1", "rlad_1_2_", "rlad_x_2_abc"):
        (tmp / name).mkdir()
    (tmp / "target").mkdir()
    (tmp / "rlad_1_2_abc").symlink_to(tmp / "target")  # by somebody else
    with scratch():
        pass
    assert len(list(tmp.iterdir())) == 6
