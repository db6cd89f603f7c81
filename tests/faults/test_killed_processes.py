"""A process of a run that is killed: the run ends, names it, and leaves nothing behind."""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ports import free_port
from processes import children
from small_run import RLAD, SMALL

import recipes

pytestmark = pytest.mark.faults


def test_a_teacher_that_dies_ends_the_run_and_is_named(tmp_path):
    arguments = [*SMALL, f"runs_dir={tmp_path}", "name=untaught", f"rollout.port={free_port()}"]
    process = subprocess.Popen(
        [*RLAD, "train", *arguments, "teacher.ranks_per_node=1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "untaught" / "logs" / "teacher_0.log"
    deadline = time.monotonic() + 300
    while not log.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    teacher = []
    while not teacher:  # which opens its log before it writes there
        assert process.poll() is None and time.monotonic() < deadline
        ranks = children(process.pid, "spawn_main")
        with suppress(FileNotFoundError):  # of a rank that has just ended
            teacher = [rank for rank in ranks if os.readlink(f"/proc/{rank.pid}/fd/1") == str(log)]
    teacher[0].kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("rlad: ")]
    assert "rank 0 of the teacher ended" in line and "SIGKILL" in line and str(log) in line


def test_a_rank_that_is_killed_is_named_and_leaves_no_process(tmp_path):
    """Fine-tuning, which starts quickest."""
    student = Path(recipes.__path__[0]) / "assets" / "kk_tiny_student"
    small = ["data.train_size=64", "sft.batch_size=8", "checkpoint.every=20", "train.ranks_per_node=2"]
    process = subprocess.Popen(
        [*RLAD, "sft", "kk_tiny_teacher_sft", f"student.path={student}", f"runs_dir={tmp_path}", "name=cut", *small],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "cut" / "checkpoints" / "latest").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    children(process.pid, "spawn_main")[0].kill()
    (line,) = process.communicate(timeout=300)[1].splitlines()  # and not a word of the other rank's end
    assert process.returncode == 2
    assert line == "rlad: rank 0 ended (SIGKILL); see its output above, and the machine's memory"
    _, left = psutil.wait_procs(started, timeout=60)
    assert left == []
