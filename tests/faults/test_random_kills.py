"""Kills at random moments, each followed by a resume: the run ends as one that was not interrupted, bit by bit."""

import os
import random
import signal
import time

import pytest
import torch
from faults.runs import run
from safetensors.torch import load_file

pytestmark = pytest.mark.faults

KILLS = 20
MEASURED = ("time/", "idle/", "memory/", "sync/")  # clocks and memory


def figures(run):
    """The last word on each step."""
    return {
        line["step"]: {key: value for key, value in line.items() if not key.startswith(MEASURED)}
        for line in run.metrics()
    }


def exported(folder):
    return load_file(folder / "hf" / "model.safetensors")


@pytest.mark.timeout(3600)
def test_fine_tuning_that_is_killed_ends_as_if_it_was_not(tmp_path):
    words = ["train.steps=150", "checkpoint.every=1", "train.ranks_per_node=2", "checkpoint.export_hf=true"]
    words += ["checkpoint.export_precision=fp32"]
    with run(tmp_path, "whole", *words) as whole:
        begun = time.monotonic()
        whole.wait_for_step(1)
        start = time.monotonic() - begun
        assert whole.end()[0] == 0
    dice, kills = random.Random(int(os.environ.get("RLAD_KILL_SEED", "0"))), 0
    resume: list[str] = []
    while True:
        with run(tmp_path, "cut", *words, *resume) as cut:
            if kills < KILLS:
                time.sleep(dice.uniform(0, 1.3 * start))  # so that no start gets far
                victims = [cut.process.pid, *(rank.pid for rank in cut.ranks)] if cut.process.poll() is None else []
                if victims:
                    os.kill(dice.choice(victims), signal.SIGKILL)
                    kills += 1
            code, _, err = cut.end()
            assert "Traceback" not in err, err
            assert cut.left() == []
            if code == 0:
                assert kills == KILLS
                break
            resume = ["resume=true"] if (cut.folder / "config.yaml").exists() else []
    assert figures(cut) == figures(whole)
    first, second = exported(cut.folder), exported(whole.folder)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
