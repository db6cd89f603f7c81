"""The order of a step: what the loop asks of a run, and what a run makes of waves."""

import json
import math
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
from prompt_table import as_prompts

from rlad_megatron import loop
from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.config.recipe import apply_overrides, load_run
from rlad_megatron.data.prompts import PromptSource
from rlad_megatron.data.window import PromptWindow
from rlad_megatron.errors import StepDropped, WeightSyncError
from rlad_megatron.objectives.entropy import EntropyBonus
from rlad_megatron.rl_run import RlRun
from rlad_megatron.run import LauncherHooks
from rlad_megatron.servers.transfer.proof import Agreement
from rlad_megatron.types import Group, Prompt, Rollout, StepResult

PROMPTS = [Prompt(f"p{i}", (1, i), "", "", "") for i in range(40)]


def a_group(number, index, prompt, *, tokens=3, rewards=(0.0, 1.0)):
    rollouts = [
        Rollout(prompt, [5] * tokens, [-1.0] * tokens, "stop", [(0, tokens)], reward=reward) for reward in rewards
    ]
    return Group(number, index, rollouts)


class ScriptedFleet:
    """Hands out a round's groups in the order that a test gives, one at a time, until there are enough."""

    def __init__(self, order=None, flat=(), **changes):
        """flat: ids of prompts whose responses all get the same reward."""
        self.order, self.changes, self.submitted, self.slept = order, changes, [], 0
        self.flat = flat
        self.agreement = Agreement(factor=5.0, float32=True)

    def submit(self, batch):
        self.submitted.append((batch.number, [prompt.id for prompt in batch.prompts]))
        order = list(self.order or range(batch.needed))
        self.left = [self._group(batch, i) for i in order]

    def _group(self, batch, index):
        prompt = batch.prompts[index]
        rewards = {"rewards": (1.0, 1.0)} if prompt.id in self.flat else {}
        return a_group(batch.number, index, prompt, **self.changes | rewards)

    def collect(self, batch, enough):
        groups = []
        while self.left and not enough(groups):
            groups.append(self.left.pop(0))
            if batch.replaces(groups[-1]):
                self.left.insert(0, self._group(batch, len(batch.prompts) - 1))
        return sorted(groups, key=lambda group: group.index)

    def sleep(self):
        self.slept += 1


class RecordingActor:
    def __init__(self, **metrics):
        self.groups = SimpleNamespace(dp_size=2, pp_size=1)
        self.metrics = {"tokens/train": 1.0, **metrics}
        self.waves, self.updates, self.old, self.watched = [], [], [], []
        self.entropy_bonus = EntropyBonus(ObjectiveConfig())

    @property
    def has_gradients(self):
        return bool(self.waves)

    def accumulate(self, samples, *, last):
        self.waves.append(([int(sample.tokens[1]) for sample in samples], last))
        self.watched += [int(sample.tokens[1]) for sample in samples if sample.watched]

    def finish_update(self, scale):
        self.updates.append((self.waves, scale))
        self.waves = []
        return StepResult(dict(self.metrics))

    def log_probs(self, samples):
        self.old.append(len(samples))
        return [sample.weight for sample in samples]

    def wait_for_param_gather(self):
        pass


def a_run(tmp_path, fleet, actor, *overrides):
    fields = ["rollout.prompts_per_step=4", "rollout.group_size=2", "objective.name=grpo", f"runs_dir={tmp_path}"]
    config = load_run("kk_tiny_cpu", [*fields, "observe.rollouts_per_step=0", *overrides])
    run = object.__new__(RlRun)
    run.config, run.actor, run.fleet, run.teacher, run.rounds = config, actor, fleet, None, {}
    run.step, run.version, run.tokenizer = 1, 0, SimpleNamespace(decode_whole=str)
    run.timers, run.perf = MagicMock(), MagicMock(tokens=0)
    run.prompts = PromptWindow(PromptSource(as_prompts(PROMPTS), seed=0), 4, config.rollout.overprovision)
    return run


def run_step(run):
    run.begin_rounds()
    waves = []
    for wave in run.waves():
        run.train_on(wave)
        waves.append(wave)
    return run.finish_updates(waves)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr("rlad_megatron.run.dist.get_rank", lambda: 0)


def test_a_step_goes_from_rollouts_to_verified_weights():
    run = MagicMock()
    run.waves.return_value = ["first", "second"]
    run.finish_updates.return_value = run.push_weights.return_value = run.verify_weights.return_value = {}
    loop.train_step(run)
    assert [name for name, _, _ in run.mock_calls if not name.startswith("timers")] == [
        "begin_rounds",
        "waves",
        "add_teacher_log_probs",
        "add_reference_log_probs",
        "train_on",
        "add_teacher_log_probs",
        "add_reference_log_probs",
        "train_on",
        "finish_updates",
        "push_weights",
        "verify_weights",
    ]


@pytest.mark.parametrize("schedule", ["phased", "streaming"])
@pytest.mark.parametrize(("order", "kept_places"), [([2, 0, 3, 1], [0, 1]), ([5, 3, 1, 4], [1, 3])])
def test_the_rollouts_that_are_kept_are_watched_in_any_order_of_groups(tmp_path, schedule, order, kept_places):
    fleet, actor = ScriptedFleet(order), RecordingActor()
    changes = [f"rollout.overprovision={max(order) - 3}", "train.microbatch_tokens=8"]
    run = a_run(tmp_path, fleet, actor, f"rollout.schedule={schedule}", *changes)
    run.config = apply_overrides(run.config, ["observe.rollouts_per_step=2"])
    run.config.run_dir.mkdir()
    run_step(run)
    kept = [json.loads(line)["id"] for line in (run.config.run_dir / "rollouts/step_00000001.jsonl").open()]
    assert kept == [fleet.submitted[0][1][place] for place in kept_places]
    assert sorted(f"p{number}" for number in actor.watched) == sorted(kept)
    assert call("write_rollouts") in run.timers.mock_calls


@pytest.mark.parametrize("schedule", ["phased", "streaming"])
def test_waves_fill_every_rank_or_are_the_whole_round(tmp_path, schedule):
    # A group has 2 * (2 + 3) tokens; 2 ranks take at least 16.
    fleet, actor = ScriptedFleet(order=[2, 0, 3, 1]), RecordingActor()
    run = a_run(tmp_path, fleet, actor, f"rollout.schedule={schedule}", "train.microbatch_tokens=8")
    metrics = run_step(run)
    numbers = {prompt: int(prompt[1:]) for prompt in fleet.submitted[0][1]}
    first, second, third, fourth = (numbers[prompt] for prompt in fleet.submitted[0][1])
    expected = {
        "phased": [([first] * 2 + [second] * 2 + [third] * 2 + [fourth] * 2, True)],
        "streaming": [([first] * 2 + [third] * 2, False), ([second] * 2 + [fourth] * 2, True)],
    }
    assert actor.updates == [(expected[schedule], 1.0)]
    assert fleet.slept == 1 and run.version == 1
    assert metrics["tokens/rollout"] == 24 and metrics["rollout/trained_fraction"] == 1


def test_dropped_groups_fill_no_wave_and_a_step_of_them_changes_nothing(tmp_path):
    fleet, actor = ScriptedFleet(rewards=(1.0, 1.0)), RecordingActor()
    run = a_run(tmp_path, fleet, actor, "rollout.schedule=streaming", "train.microbatch_tokens=1")
    metrics = run_step(run)
    assert not actor.updates and run.version == 0
    assert metrics["rollout/trained_fraction"] == metrics["tokens/train"] == 0


def test_token_mean_is_scaled_by_all_responses_when_they_are_known(tmp_path):
    fleet, actor = ScriptedFleet(tokens=5), RecordingActor()
    run = a_run(tmp_path, fleet, actor, "rollout.schedule=streaming", "objective.aggregation=token_mean")
    run_step(run)
    assert actor.updates[0][1] == pytest.approx(8 * 96 / 40)


@pytest.mark.parametrize("schedule", ["phased", "streaming"])
def test_several_updates_take_groups_in_the_order_of_their_prompts(tmp_path, schedule):
    fleet, actor = ScriptedFleet(order=[3, 1, 0, 2]), RecordingActor()
    changes = ["train.updates_per_rollout=2", "train.microbatch_tokens=1", f"rollout.schedule={schedule}"]
    run = a_run(tmp_path, fleet, actor, *changes)
    run_step(run)
    order = [int(prompt[1:]) for prompt in fleet.submitted[0][1]]
    first, second = ([number for number in part for _ in range(2)] for part in (order[:2], order[2:]))
    assert [waves for waves, _ in actor.updates] == [[(first, True)], [(second, True)]]
    assert sum(actor.old) == 8 and run.version == 2


def test_working_ahead_begins_later_rounds_once_and_none_beyond_the_end(tmp_path):
    fleet, actor = ScriptedFleet(), RecordingActor()
    changes = ["rollout.schedule=ahead", "rollout.ahead=2", "train.steps=3", "objective.mismatch_correction=icepop"]
    run = a_run(tmp_path, fleet, actor, *changes)
    run.begin_rounds()
    run.step = 2
    run.begin_rounds()
    assert [number for number, _ in fleet.submitted] == [1, 2, 3]
    prompts = [prompt for _, names in fleet.submitted for prompt in names]
    assert len({*prompts}) == 12
    run.rounds.clear()
    fleet.submitted.clear()
    run.begin_rounds()  # as after a resume: the window has the rounds
    assert [name for _, names in fleet.submitted for name in names] == prompts[4:]


@pytest.mark.parametrize(("resume", "kept"), [(True, [1, 2]), (False, [1, 2, 3])])
def test_a_resumed_run_drops_the_rollouts_of_the_steps_that_it_repeats(tmp_path, monkeypatch, resume, kept):
    run = a_run(tmp_path, ScriptedFleet(), RecordingActor(), f"resume={resume}")
    run.metrics, run.timeline = MagicMock(), MagicMock()
    monkeypatch.setattr(run, "_resume", lambda: setattr(run, "step", 2))
    (run.config.run_dir / "rollouts").mkdir(parents=True)
    for step in (1, 2, 3):
        (run.config.run_dir / f"rollouts/step_{step:08d}.jsonl").touch()
    run.begin()
    assert sorted(int(file.stem[5:]) for file in (run.config.run_dir / "rollouts").iterdir()) == kept


def test_the_lag_of_versions_is_measured(tmp_path):
    fleet, actor = ScriptedFleet(), RecordingActor()
    run = a_run(tmp_path, fleet, actor, "rollout.schedule=ahead", "objective.mismatch_correction=icepop")
    run.version = 2
    run.begin_rounds()
    fleet.left[0].rollouts[0].versions = [(0, 1), (1, 1), (2, 1)]
    for group in fleet.left:
        for rollout in group.rollouts:
            rollout.versions = rollout.versions if len(rollout.versions) > 1 else [(2, 3)]
    waves = list(run.waves())
    metrics = run.finish_updates(waves)
    assert metrics["rollout/version_lag_mean"] == pytest.approx(3 / 24)
    assert metrics["rollout/version_lag_max"] == 2


def test_prompts_that_a_round_does_not_need_are_deferred(tmp_path):
    fleet, actor = ScriptedFleet(order=[5, 0, 1, 3]), RecordingActor()
    run = a_run(tmp_path, fleet, actor, "rollout.overprovision=2")
    for run.step in (1, 2):
        run_step(run)
    (_, first), (_, second) = fleet.submitted
    assert len(first) == len(second) == 6
    assert [prompt.id for prompt in run.prompts.round(3)] == [first[2], first[4], second[2], second[4]]


DYNAMIC = ["objective.dynamic_sampling=8", "train.microbatch_tokens=8"]


def stream_of_prompts(count):
    return [prompt.id for prompt in PromptSource(as_prompts(PROMPTS), seed=0).next_batch(count)]


@pytest.mark.parametrize("schedule", ["phased", "streaming"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_dynamic_sampling_takes_the_first_groups_with_variance_whichever_finish_first(tmp_path, schedule, order):
    names = stream_of_prompts(7)
    fleet, actor = ScriptedFleet(order, flat={names[1], names[3], names[4]}), RecordingActor()
    run = a_run(tmp_path, fleet, actor, f"rollout.schedule={schedule}", *DYNAMIC)
    metrics = run_step(run)
    ((waves, scale),) = actor.updates
    trained = [f"p{number}" for numbers, _ in waves for number in numbers[::2]]
    assert sorted(trained) == sorted([names[0], names[2], names[5], names[6]]) and scale == 1.0
    assert metrics["rollout/replaced_groups"] == 3 and metrics["rollout/missing_groups"] == 0
    assert metrics["rollout/trained_fraction"] == 8 / 14 and metrics["reward/mean"] == (4 * 0.5 + 3) / 7
    assert run.prompts.state_dict()["position"] == 7 and not run.prompts.state_dict()["deferred"]


def test_dynamic_sampling_ends_at_its_bound_and_what_is_missing_counts_as_zero(tmp_path):
    names = stream_of_prompts(6)
    fleet, actor = ScriptedFleet(flat={*names} - {names[0], names[5]}, tokens=5), RecordingActor()
    changes = ["objective.dynamic_sampling=6", "objective.aggregation=token_mean", "train.updates_per_rollout=2"]
    run = a_run(tmp_path, fleet, actor, *changes)
    metrics = run_step(run)
    assert metrics["rollout/replaced_groups"] == 2 and metrics["rollout/missing_groups"] == 2
    # Of each update's two groups one is flat; its responses are in the divisor.
    assert [[int(name[1:])] * 2 for name in (names[0], names[5])] == [waves[0][0] for waves, _ in actor.updates]
    assert [scale for _, scale in actor.updates] == [pytest.approx(4 * 96 / 20)] * 2
    assert run.prompts.state_dict()["position"] == 6


def test_a_step_that_is_repeated_after_a_kill_samples_the_same_prompts(tmp_path):
    names = stream_of_prompts(7)
    changes = ["rollout.schedule=ahead", "objective.mismatch_correction=icepop", *DYNAMIC]
    run = a_run(tmp_path, ScriptedFleet(flat={names[2]}), RecordingActor(), *changes)
    run_step(run)  # with the next round begun
    run.fleet.left = [run.fleet._group(run.rounds[2], i) for i in range(4)]
    saved = run.prompts.state_dict()
    run.step = 2
    first = list(run.waves())
    prompts = [group.rollouts[0].prompt.id for wave in first for group in wave.groups]
    again = a_run(tmp_path, ScriptedFleet(flat={names[2]}), RecordingActor(), *changes, "train.steps=2")
    again.prompts.load_state_dict(saved)
    again.step = 2
    run_step(again)
    assert [name for _, round_ in again.fleet.submitted for name in round_] == prompts
    assert again.prompts.state_dict()["position"] == saved["position"]


def test_rollouts_that_the_student_would_not_have_sampled_end_the_run(tmp_path):
    actor = RecordingActor(**{"mismatch/abs_mean": 1e-4, "mismatch/abs_p99": 5e-4})
    run = a_run(tmp_path, ScriptedFleet(), actor)
    run_step(run)
    actor.metrics["mismatch/abs_p99"] = 0.2
    run.step = 2
    with pytest.raises(WeightSyncError, match=r"agreement: the sampler .* 0\.2 nats \(p99 over the rollouts"):
        run_step(run)
    ahead = a_run(tmp_path, ScriptedFleet(), actor, "rollout.schedule=ahead", "objective.mismatch_correction=icepop")
    run_step(ahead)  # there the sampler's weights are older by design


def test_a_broken_update_is_no_disagreement(tmp_path):
    actor = RecordingActor(**{"mismatch/abs_mean": math.nan, "mismatch/abs_p99": math.nan})
    actor.finish_update = lambda scale: StepResult(dict(actor.metrics), skipped=True)
    metrics = run_step(a_run(tmp_path, ScriptedFleet(), actor))
    assert metrics["train/skipped"] == 1  # NonFiniteGuard handles it


def test_a_step_that_is_dropped_leaves_the_state_of_the_one_before(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("rlad_megatron.run.dist.all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(
        "rlad_megatron.run.checkpoint.save", lambda folder, step, actor, state, **_: saved.append((step, state))
    )
    fleet = ScriptedFleet()
    run = a_run(tmp_path, fleet, RecordingActor())
    run.step, run.saved_step, run.id, run._whole = 0, 0, "id", {}
    run.hooks, run.console, run.timeline = LauncherHooks(lambda: None), MagicMock(), MagicMock()
    assert not run.saved_to_stop()
    run.step = 1
    run_step(run)
    assert not run.saved_to_stop()
    after_one = run.state()
    run.step = 2

    def collect(batch, enough):
        raise StepDropped

    fleet.collect = collect
    with pytest.raises(StepDropped):
        run_step(run)
    assert run.state()["prompts"] != after_one["prompts"]  # the round has begun
    run.drop_step()
    assert saved == [(1, after_one)] and run.step == 1
    run.drop_step()
    assert len(saved) == 2 and run.step == 0


@pytest.fixture
def opened(monkeypatch):
    """A run after step 4 of 9."""
    run = MagicMock(step=4)
    run.config.train.steps, run.config.eval.teacher = 9, False
    run.saved_to_stop.return_value = False
    monkeypatch.setattr(loop, "read_prompts", lambda config: MagicMock())
    monkeypatch.setattr(loop, "open_run", lambda *_: MagicMock(__enter__=lambda _: run, __exit__=lambda *_: None))
    return run


def test_a_step_whose_evaluation_is_dropped_is_whole(opened, monkeypatch):
    run = opened
    run.config.eval.every = 5
    run.step_times.return_value = {"time/step": 1.0}
    monkeypatch.setattr(loop, "train_step", lambda run: {"loss": 2.0})
    monkeypatch.setattr(loop, "evaluate", MagicMock(side_effect=StepDropped))
    assert loop.train(run.config, MagicMock()) is False
    run.log.assert_called_once_with({"loss": 2.0, "time/step": 1.0})
    run.save_checkpoint.assert_called_once_with()
    assert run.step == 5
    run.drop_step.assert_not_called()
    run.finish.assert_not_called()


def test_the_loop_ends_with_a_dropped_step(opened, monkeypatch):
    run = opened
    monkeypatch.setattr(loop, "train_step", MagicMock(side_effect=StepDropped))
    assert loop.train(run.config, MagicMock()) is False
    run.drop_step.assert_called_once_with()
    run.log.assert_not_called()
    run.finish.assert_not_called()
