"""However a run ends, it says how to go on, its last whole step is kept, and nothing of it is left."""

import os
import re
import signal
import time

import pytest
from faults.runs import run
from processes import children

pytestmark = pytest.mark.faults

LONG = ["train.steps=100000", "checkpoint.every=0"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_whole_step(tmp_path, signum):
    with run(tmp_path, "told", *LONG, "train.ranks_per_node=2") as told:
        told.wait_for_step(3)
        os.killpg(told.process.pid, signum)  # as a terminal, or a service manager
        code, _, err = told.end()
        assert code == 128 + signum and "Traceback" not in err
        first, last = (line for line in err.splitlines() if line.startswith("rlad: "))
        assert first.startswith("rlad: stopping; the step at hand has 60 s")
        step = told.metrics()[-1]["step"]
        config = told.folder / "config.yaml"
        assert last == f"rlad: stopped after step {step}; continue with: rlad sft {config} resume=true"
        assert (told.folder / "checkpoints" / "latest").read_text() == str(step)
        assert told.left() == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_nothing_is_trained_yet_ends_at_once(tmp_path, signum):
    with run(tmp_path, "early", *LONG, "train.ranks_per_node=2") as early:
        early.wait_for(lambda: early.ranks)
        os.killpg(early.process.pid, signum)  # ranks are still importing
        code, out, err = early.end()
        last = err.splitlines()[-1]
        assert code == 128 + signum and last.startswith("rlad: interrupted; ") and "Traceback" not in out + err
        assert early.left() == []


def test_a_second_signal_ends_at_once(tmp_path):
    with run(tmp_path, "twice", *LONG) as twice:
        twice.wait_for_step(1)
        rank, *_ = twice.ranks
        rank.suspend()  # so that the first does not end it
        twice.process.terminate()
        time.sleep(1)
        assert twice.process.poll() is None
        twice.process.send_signal(signal.SIGINT)
        code, _, err = twice.end(30)
        assert code == 130 and err.splitlines()[-1].startswith("rlad: interrupted; continue with: rlad sft ")
        assert twice.left() == []


def test_a_launcher_that_is_killed_takes_everything_with_it(tmp_path):
    with run(tmp_path, "killed", *LONG, "train.ranks_per_node=2") as killed:
        killed.wait_for_step(1)
        killed.ranks[1].suspend()
        killed.process.kill()
        assert killed.left() == []


def test_a_launcher_that_is_killed_while_a_rank_starts(tmp_path):
    with run(tmp_path, "starting", *LONG) as starting:
        starting.wait_for(lambda: starting.ranks)
        starting.process.kill()
        assert starting.left() == []


def test_the_next_start_on_the_host_removes_what_nothing_else_could(tmp_path):
    with run(tmp_path, "first", *LONG) as first:
        first.wait_for_step(1)
        rank, *_ = first.ranks
        (watcher,) = children(first.process.pid, "rlad_megatron.launch.scratch")
        rank.suspend()
        watcher.kill()
        first.process.kill()
        first.process.wait()
        assert list(first.tmp.glob("rlad_*"))
        with run(tmp_path, "second", "train.steps=1", TMPDIR=str(first.tmp)) as second:
            assert second.end()[0] == 0
        assert first.left() == []


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_that_ends_without_a_word_has_failed(tmp_path, code):
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, sys, threading
if "--multiprocessing-fork" in sys.argv:
    from rlad_megatron import loop
    true = loop.samples_from_traces
    def leaves(*arguments):
        if os.environ.get("RANK") == "1":
            os._exit({code})
        return true(*arguments)
    loop.samples_from_traces = leaves
"""
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with run(tmp_path, "silent", *LONG, "train.ranks_per_node=2", PYTHONPATH=path) as silent:
        assert silent.said() == (
            f"rlad: rank 1 ended with exit code {code} before it had finished; see its output above, and the "
            "machine's memory"
        )
        assert silent.left() == []


def test_a_rank_that_is_stopped_is_named(tmp_path):
    limits = ["rollout.startup_timeout_s=20", "train.distributed_timeout_s=30"]
    with run(tmp_path, "stopped", *LONG, *limits, "train.ranks_per_node=2") as stopped:
        stopped.wait_for_step(1)
        rank = stopped.ranks[1]
        rank.suspend()
        assert re.fullmatch(
            r"rlad: a collective did not end within train.distributed_timeout_s=30: rank 1 \(.*, process "
            rf"{rank.pid}\) has given no sign of life for \d+ s \(was it stopped, or is its host gone\?\); "
            "fix that, or raise the timeout, and continue with resume=true",
            stopped.said(),
        )
        assert stopped.left() == []
