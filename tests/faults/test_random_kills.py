"""Kills at random moments, each followed by a resume: the run ends as one that was not interrupted, bit by bit."""

import json
import os
import random
import signal
import time
from collections import Counter

import pytest
import torch
from faults.runs import SFT, run
from ports import free_port
from safetensors.torch import load_file
from small_run import SMALL

pytestmark = pytest.mark.faults

KILLS = 5
# Clocks and memory; and log-probs of the servers, which depend on what else is in a batch.
MEASURED = ("time/", "idle/", "memory/", "sync/", "mismatch/", "perf/", "slowest/")


def figures(run):
    """The last word on each step."""
    return {
        line["step"]: {key: value for key, value in line.items() if not key.startswith(MEASURED)}
        for line in run.metrics()
    }


def steps_by_row(run):
    """How often a rank has each step in the timeline."""
    events = json.loads((run.folder / "timeline.json").read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return Counter((rows[event["tid"]], event["args"]["step"]) for event in events if event["name"] == "step")


def exported(run):
    return load_file(run.folder / "hf" / "model.safetensors")


def kill_and_resume(runs, words, verb, most_steps):
    """Compare a run with one that is killed KILLS times: its launcher, or one of its ranks.

    Every other kill comes while it starts, the others after up to `most_steps` steps.
    """
    words = [*words, "checkpoint.every=1", "checkpoint.export_hf=true", "checkpoint.export_precision=fp32"]
    with run(runs, "whole", *words, verb=verb) as whole:
        begun = time.monotonic()
        whole.wait_for_step(1)
        start = time.monotonic() - begun
        assert whole.end(1200)[0] == 0
    dice = random.Random(int(os.environ.get("RLAD_KILL_SEED", "0")))
    resume: list[str] = []
    for kill in range(KILLS):
        with run(runs, "cut", *words, *resume, verb=verb) as cut:
            before = max(figures(cut), default=0)
            if kill % 2:
                deadline = time.monotonic() + dice.uniform(0.2, 1.0) * start
                while time.monotonic() < deadline and max(figures(cut), default=0) == before:
                    time.sleep(0.01)
            else:
                cut.wait_for_step(before + dice.randint(1, most_steps))
                time.sleep(dice.uniform(0.0, 0.2))
            victims = [cut.process.pid, *(rank.pid for rank in cut.ranks)]
            assert cut.process.poll() is None
            os.kill(dice.choice(victims), signal.SIGKILL)
            code, out, err = cut.end()
            assert code != 0 and "Traceback" not in out + err, out + err
            assert cut.left() == []
        resume = ["resume=true"] if (cut.folder / "config.yaml").exists() else []
    with run(runs, "cut", *words, *resume, verb=verb) as cut:
        assert cut.end(1200)[0] == 0
        assert cut.left() == []
    assert figures(cut) == figures(whole)
    assert steps_by_row(cut) == steps_by_row(whole) and set(steps_by_row(cut).values()) == {1}
    assert "resume: false" in (cut.folder / "config.yaml").read_text()  # as RECIPE it starts a new run
    first, second = exported(cut), exported(whole)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.timeout(3600)
def test_fine_tuning_that_is_killed_ends_as_if_it_was_not(tmp_path):
    kill_and_resume(tmp_path, ["train.steps=100", "train.ranks_per_node=2"], SFT, most_steps=20)


@pytest.mark.timeout(7200)
def test_rl_that_is_killed_ends_as_if_it_was_not(tmp_path):
    """With a teacher on a rank of its own, which is killed too."""
    small = [word for word in SMALL if not word.startswith(("train.steps", "checkpoint.every"))]
    words = ["train.steps=25", "teacher.ranks_per_node=1", f"rollout.port={free_port()}"]
    kill_and_resume(tmp_path, words, ["train", *small], most_steps=5)
