"""The order of a step: what the loop asks of a run."""

import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from rlad_megatron import loop
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import WeightSyncError
from rlad_megatron.run import RlRun, TrainerRun
from rlad_megatron.servers.transfer.proof import Agreement
from rlad_megatron.types import Prompt, Rollout


def recorded_run():
    """A run that records what it is asked, with one group of responses, one of which is right."""
    prompt = Prompt("p", (1, 2), "", "", "")
    group = [Rollout(prompt, [3], [-1.0], "stop", [], reward=reward) for reward in (0.0, 1.0)]
    run = MagicMock()
    run.config = load_run("kk_tiny_cpu", [])
    run.fleet.generate.return_value = [group]
    for measured in (run.update, run.verify_weights, run.timers.pop):
        measured.return_value = {}
    return run


def calls(run):
    return [name for name, _, _ in run.mock_calls if not name.startswith("timers")]


def test_a_step_goes_from_rollouts_to_verified_weights():
    run = recorded_run()
    loop.train_step(run)
    assert calls(run) == [
        "prompts.next_batch",
        "fleet.generate",
        "fleet.sleep",
        "add_rewards",
        "write_rollouts",
        "add_teacher_log_probs",
        "add_old_log_probs",
        "update",
        "push_weights",
        "verify_weights",
    ]


def test_an_evaluation_leaves_servers_awake():
    run = recorded_run()
    loop.evaluate(run)
    assert calls(run) == ["fleet.generate", "add_rewards"]


def test_rollouts_that_the_student_would_not_have_sampled_end_the_run(monkeypatch):
    run = object.__new__(RlRun)
    run.fleet = SimpleNamespace(agreement=Agreement(factor=5.0, float32=True))
    metrics = {"train/skipped": 0, "mismatch/abs_mean": 1e-4, "mismatch/abs_p99": 5e-4}
    monkeypatch.setattr(TrainerRun, "update", lambda self, updates: metrics)
    assert run.update([]) is metrics
    metrics["mismatch/abs_p99"] = 0.2
    with pytest.raises(WeightSyncError, match=r"agreement: the sampler .* 0\.2 nats \(p99 over the rollouts"):
        run.update([])
    metrics |= {"train/skipped": 1, "mismatch/abs_mean": math.nan}  # NonFiniteGuard handles a broken update
    assert run.update([]) is metrics
    del metrics["mismatch/abs_mean"]  # all groups were dropped
    metrics["train/skipped"] = 0
    assert run.update([]) is metrics
