"""One writer for a run folder."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from rlad_megatron.errors import ConfigError
from rlad_megatron.launch import lock as lock_module
from rlad_megatron.launch.lock import only_writer

HOLD = """
import sys, time
from pathlib import Path
from rlad_megatron.launch.lock import only_writer
with only_writer(Path(sys.argv[1]), "train", {"SLURM_JOB_ID": "7"}):
    print("held", flush=True)
    time.sleep(600)
"""
# Saves when it is told to stop, and when it ends otherwise.
SAVES = """
import signal, sys, time
from pathlib import Path
from rlad_megatron.launch import lock
lock.TOUCH_S = 0.01
folder = Path(sys.argv[1])
def save(*_):
    (folder / "checkpoints" / "latest").write_text("its own")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, save)
try:
    with lock.only_writer(folder, "train"):
        print("held", flush=True)
        time.sleep(60)
finally:
    save()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def held(tmp_path):
    with pytest.raises(ConfigError) as refused, only_writer(tmp_path, "sft"):
        pytest.fail("held twice")
    return str(refused.value)


def elsewhere(tmp_path, **changes):
    """The lock says that its holder is on another machine."""
    file = tmp_path / "lock"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "another", "host": "n7"} | changes))


def test_a_second_writer_is_refused_and_told_who_holds_the_folder(holder, tmp_path):
    said = held(tmp_path)
    assert f"{tmp_path} is in use by `rlad train` on " in said and f"(process {holder.pid}, job 7) since 2" in said
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("is_collected", [True, False])
def test_the_lock_of_a_dead_process_is_recognised_at_once(holder, tmp_path, is_collected):
    holder.kill()
    if is_collected:
        holder.wait()
    else:  # a zombie, as under a parent that is busy
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with only_writer(tmp_path, "sft"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_process_with_the_number_of_a_dead_holder_is_not_the_holder(holder, tmp_path):
    content = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps(content | {"started": content["started"] - 1}))
    with only_writer(tmp_path, "sft"):
        pass


def test_a_holder_on_another_host_is_dead_when_it_has_not_touched_its_lock(holder, tmp_path):
    elsewhere(tmp_path)
    assert "on n7" in held(tmp_path)
    past = time.time() - lock_module.STALE_S
    os.utime(tmp_path / "lock", (past + 20, past + 20))
    assert "on n7" in held(tmp_path)
    os.utime(tmp_path / "lock", (past - 1, past - 1))
    with only_writer(tmp_path, "sft"):
        pass


@pytest.mark.parametrize(("environment", "takes"), [((7, 1), True), ((7, 0), False), ((8, 1), False)])
def test_a_requeued_job_takes_the_lock_of_its_earlier_start(holder, tmp_path, environment, takes):
    elsewhere(tmp_path)
    job, restart = map(str, environment)
    environment = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart}
    try:
        with only_writer(tmp_path, "train", environment):
            assert takes
    except ConfigError:
        assert not takes


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_a_lock_that_says_nothing_goes_stale_too(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    assert "is in use by" in held(tmp_path)
    os.utime(tmp_path / "lock", (0, 0))
    with only_writer(tmp_path, "sft"):
        pass


def test_of_many_that_find_a_dead_lock_one_takes_it(tmp_path, monkeypatch):
    """Whoever removes it must not remove the lock of one that was faster."""
    is_dead = lock_module._is_dead

    def slowly(*facts):
        found = is_dead(*facts)
        time.sleep(0.005)  # another may act now
        return found

    monkeypatch.setattr(lock_module, "_is_dead", slowly)
    for _ in range(5):
        (tmp_path / "lock").write_text("{}")
        os.utime(tmp_path / "lock", (0, 0))
        inside, together, done = [], threading.Barrier(8), threading.Event()

        def enter(inside=inside, together=together, done=done):
            together.wait()
            try:
                with only_writer(tmp_path, "sft"):
                    inside.append(1)
                    done.wait(20)
            except ConfigError:
                pass

        threads = [threading.Thread(target=enter) for _ in range(8)]
        for thread in threads:
            thread.start()
        while len(inside) < 2 and (not inside or sum(thread.is_alive() for thread in threads) > 1):
            time.sleep(0.005)
        done.set()
        for thread in threads:
            thread.join()
        assert len(inside) == 1
        assert not list(tmp_path.iterdir())


def wait_for(what):
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_holder_touches_its_lock_and_puts_one_back_that_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "TOUCH_S", 0.01)
    lock = tmp_path / "lock"
    with only_writer(tmp_path, "train"):
        os.utime(lock, (0, 0))
        wait_for(lambda: lock.stat().st_mtime)
        lock.unlink()
        wait_for(lock.exists)
        assert "in use by `rlad train`" in held(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_holder_whose_lock_another_has_taken_saves_nothing(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("the other's")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", SAVES, str(tmp_path)], **options)
    assert holder.stdout.readline() == "held\n"
    (tmp_path / "other").write_text('{"token": "another"}')
    (tmp_path / "other").replace(tmp_path / "lock")
    _, err = holder.communicate(timeout=30)
    assert holder.returncode == 2 and err == f"rlad: another process has taken {tmp_path / 'lock'}; this one ends\n"
    assert [path.read_text() for path in (tmp_path / "checkpoints").iterdir()] == ["the other's"]
    assert "another" in (tmp_path / "lock").read_text()


def test_a_link_whose_answer_was_lost_is_ours(tmp_path, monkeypatch):
    """NFS asks again, and is told that the name is taken."""
    link = os.link

    def lost(source, target):
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", lost)
    with only_writer(tmp_path, "train"):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_start_can_wait_for_a_holder_that_may_be_dead(holder, tmp_path):
    elsewhere(tmp_path)
    lock = tmp_path / "lock"
    past = time.time() - lock_module.STALE_S + 0.5
    os.utime(lock, (past, past))
    assert "in use by" in held(tmp_path)
    with only_writer(tmp_path, "sft", patience_s=30):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_start_that_waits_is_refused_when_the_holder_touches_its_lock(holder, tmp_path):
    elsewhere(tmp_path)
    os.utime(tmp_path / "lock", (time.time() - 60,) * 2)
    touch = threading.Timer(0.3, os.utime, [tmp_path / "lock"])
    touch.start()
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="in use by"), only_writer(tmp_path, "sft", patience_s=30):
        pytest.fail("held twice")
    assert time.monotonic() - begun < 20


def test_the_guard_of_a_takeover_that_was_killed_goes_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "GUARD_S", 0.2)
    for name in ("lock", "lock.takeover"):
        (tmp_path / name).write_text("{}")
    os.utime(tmp_path / "lock", (0, 0))
    with only_writer(tmp_path, "sft"):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), only_writer(tmp_path / "runs" / "name", "train"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with only_writer(tmp_path / "runs" / "name", "train"):
        (tmp_path / "runs" / "name" / "file").touch()
    assert [path.name for path in (tmp_path / "runs" / "name").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be locked .*; use a folder"), only_writer(tmp_path, "x"):
        pass
