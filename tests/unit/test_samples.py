"""From rollouts to samples: which responses are trained on, with which advantage and weight; and a step's figures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.data.quota import counted_groups
from rlad_megatron.data.samples import first_sample, samples_from_rollouts, samples_from_traces, set_log_probs
from rlad_megatron.errors import TrainingError
from rlad_megatron.observe.rollout_index import RolloutIndex
from rlad_megatron.observe.rollouts import mean_of_updates, reward_metrics, write_rollouts
from rlad_megatron.types import Group, Prompt, Rollout

PROMPT = Prompt(id="p", tokens=(7, 8, 9), answer="", subset="all", text="")


def group(*rewards_and_lengths):
    return [
        Rollout(PROMPT, list(range(1, length + 1)), [-0.5] * length, "stop", [], reward=reward, solved=reward > 0)
        for reward, length in rewards_and_lengths
    ]


MIXED, EQUAL = group((1.0, 2), (0.0, 4)), group((1.0, 3), (1.0, 1))


def test_a_group_with_equal_rewards_makes_no_sample_but_counts_in_the_mean():
    samples = samples_from_rollouts([MIXED, EQUAL], ObjectiveConfig(name="trrd"))
    assert [sample.advantage for sample in samples] == [1.0, -1.0]
    assert samples[0].tokens.tolist() == [7, 8, 9, 1, 2] and samples[0].prompt_length == 3
    # Mean over four responses of the mean over tokens.
    assert torch.allclose(samples[0].weight, torch.full((2,), 1 / 8))
    assert torch.allclose(samples[1].weight, torch.full((4,), 1 / 16))
    assert samples[0].sampler_log_probs.tolist() == [-0.5, -0.5]


def test_a_sample_keeps_the_experts_of_its_rollout():
    rollouts = group((1.0, 2), (0.0, 4))
    rollouts[1].experts = np.arange(6 * 2 * 3).reshape(6, 2, 3).astype(np.uint16)
    first, second = samples_from_rollouts([rollouts], ObjectiveConfig(name="grpo"))
    assert first.experts is None
    assert second.experts.dtype == torch.uint16 and second.experts.tolist() == rollouts[1].experts.tolist()


def test_rewards_that_float32_would_make_equal_differ(tmp_path):
    close = group((1e8, 1), (1e8 + 1, 1))
    assert [sample.advantage for sample in samples_from_rollouts([close], ObjectiveConfig(name="grpo"))] == [-1.0, 1.0]
    write_rollouts(tmp_path, 1, [close], [None], pieces=str)
    assert json.loads((tmp_path / "rollouts" / "step_00000001.jsonl").read_text())["advantage"] == -1.0


@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig("kdrl"), ObjectiveConfig("on_policy_kl"), ObjectiveConfig("grpo", reference_kl=0.1)],
    ids=str,
)
def test_objectives_with_another_source_of_gradient_keep_all(objective):
    samples = samples_from_rollouts([MIXED, EQUAL], objective)
    assert len(samples) == 4
    assert sum(float(sample.weight.sum()) for sample in samples) == pytest.approx(1.0)


@pytest.mark.parametrize("objective", [ObjectiveConfig("kdrl"), ObjectiveConfig("grpo", reference_kl=0.1)], ids=str)
def test_replaced_groups_make_no_sample_whatever_the_objective(objective):
    assert len(samples_from_rollouts([MIXED, EQUAL], replace(objective, dynamic_sampling=99))) == 2


def test_the_overlong_filter_leaves_out_what_was_cut_off_but_not_its_reward():
    rollouts = group((1.0, 2), (0.0, 4), (0.0, 3), (1.0, 3))
    rollouts[1].finish_reason = "length"
    objective = ObjectiveConfig(name="grpo", overlong_filter=True)
    samples = samples_from_rollouts([rollouts], objective)
    assert [sample.advantage for sample in samples] == [1.0, -1.0, 1.0]
    assert [sample.response_length for sample in samples] == [2, 3, 3]
    assert float(samples[0].weight.sum()) == pytest.approx(1 / 4)  # it counts in the mean
    assert len(samples_from_rollouts([rollouts], ObjectiveConfig(name="grpo"))) == 4


def test_dr_grpo_centers_rewards_and_weighs_tokens_alike(tmp_path):
    objective = ObjectiveConfig(name="grpo", advantage_std=False, aggregation="fixed_length")
    samples = samples_from_rollouts([MIXED], objective, whole=(4, 10))
    assert [sample.advantage for sample in samples] == [0.5, -0.5]
    assert torch.allclose(torch.cat([sample.weight for sample in samples]), torch.full((6,), 1 / 40))
    write_rollouts(tmp_path, 1, [MIXED], [None], pieces=str, std=False)
    assert json.loads((tmp_path / "rollouts" / "step_00000001.jsonl").read_text())["advantage"] == 0.5


def test_token_mean_gives_every_token_the_same_weight():
    samples = samples_from_rollouts([MIXED], ObjectiveConfig(name="grpo", aggregation="token_mean"))
    assert torch.allclose(torch.cat([sample.weight for sample in samples]), torch.full((6,), 1 / 6))


def test_traces_weigh_one_in_all():
    samples = samples_from_traces([(PROMPT, [1, 2]), (PROMPT, [3, 4, 5, 6])], "token_mean")
    assert torch.allclose(samples[1].weight, torch.full((4,), 1 / 6))
    assert samples[1].tokens.tolist() == [7, 8, 9, 3, 4, 5, 6]


@pytest.mark.parametrize("value", ["nan", "-inf"])
@pytest.mark.parametrize(
    ("name", "remedy"), [("teacher", "teacher.path"), ("old", "resume"), ("reference", "student.path")]
)
def test_log_probs_that_are_not_finite_are_refused_where_they_enter(name, remedy, value):
    samples = samples_from_rollouts([MIXED], ObjectiveConfig(name="kdrl"))
    values = [torch.tensor([-0.1, -0.2]), torch.tensor([-0.1, -0.2, -0.3, -0.4])]
    set_log_probs(samples, **{name: values})
    assert getattr(samples[1], f"{name}_log_probs") is values[1]
    values[1][2] = float(value)
    with pytest.raises(
        TrainingError, match=rf"{name}_log_probs of sample 1 is {value} at response token 2 \(id 3\); .*{remedy}"
    ):
        set_log_probs(samples, **{name: values})


def test_a_kept_rollout_has_what_the_update_saw_of_its_tokens(tmp_path):
    objective = ObjectiveConfig(name="trrd")
    groups, samples = [MIXED, EQUAL], [samples_from_rollouts([group], objective) for group in (MIXED, EQUAL)]
    first = [first_sample(group, of_group, objective) for group, of_group in zip(groups, samples, strict=True)]
    assert first == [samples[0][0], None], "the second group is not trained on"
    first[0].teacher_log_probs = torch.tensor([-1.0, -2.0])
    first[0].token_stats = {"log_probs": torch.tensor([-0.5000012, -0.4]), "clipped": torch.tensor([1.0, 0.0])}
    first[0].token_stats["ratio"] = torch.tensor([float("nan"), 1.0])
    write_rollouts(tmp_path, 1, groups, first, pieces=lambda tokens: [f"t{token}" for token in tokens])
    lines = (tmp_path / "rollouts" / "step_00000001.jsonl").read_text().splitlines()
    trained, dropped = map(json.loads, lines)
    assert trained["response_pieces"] == ["t1", "t2"] and trained["teacher_log_probs"] == [-1.0, -2.0]
    assert trained["old_log_probs"] == trained["student_log_probs"] == [-0.5, -0.4]
    assert trained["mismatch"] == [pytest.approx(-1.2e-6, rel=0.1), pytest.approx(0.1)] and trained["clipped"] == [1, 0]
    assert trained["ratio"] == [None, 1.0]
    assert dropped["log_probs"] == [-0.5] * 3 and "student_log_probs" not in dropped
    index = RolloutIndex(tmp_path)
    index.poll()
    assert [row["tokens"] for row in index.by_number()] == [2, 3], "lists read the beginning of a line"


def test_the_sample_of_a_filtered_first_rollout_is_not_anothers():
    rollouts = group((1.0, 2), (0.0, 4))
    rollouts[0].finish_reason = "length"
    objective = ObjectiveConfig(name="grpo", overlong_filter=True)
    assert first_sample(rollouts, samples_from_rollouts([rollouts], objective), objective) is None


def test_figures_of_a_step():
    metrics = reward_metrics([MIXED, EQUAL], trained=2, version=0)
    assert metrics["reward/mean"] == 0.75 and metrics["reward/solved"] == 0.75
    assert metrics["rollout/trained_fraction"] == 0.5 and metrics["tokens/rollout"] == 10


def test_several_updates_become_one_set_of_figures():
    first = {"loss/policy": 1.0, "tokens/train": 10.0, "mismatch/abs_max": 0.3, "lr": 1e-3, "train/skipped": 0}
    second = {"loss/policy": 3.0, "tokens/train": 4.0, "mismatch/abs_max": 0.1, "lr": 2e-3, "train/skipped": 1}
    assert mean_of_updates([first, second]) == {
        "loss/policy": 2.0,
        "tokens/train": 14.0,
        "mismatch/abs_max": 0.3,
        "lr": 2e-3,
        "train/skipped": 1,
    }
    assert mean_of_updates([first]) == first


def test_an_update_counts_groups_in_the_order_of_prompts_whichever_finish_first():
    trained = {0: False, 1: True, 2: False, 3: True, 4: False}
    found = [(Group(1, index, []), ["sample"] * trained[index]) for index in (4, 3, 2, 1, 0)]
    for needed, expected in ((2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])):
        assert [group.index for group, _ in counted_groups(found, needed)] == expected
