"""A dedicated teacher that is asked as groups finish."""

import pytest
import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.errors import TrainingError
from rlad_megatron.teacher.client import ask_teacher
from rlad_megatron.types import EVALUATION, Group, Prompt, Rollout

PROMPT = Prompt("p", (7, 8), "", "", "")


class Teacher:
    def __init__(self, factor=-0.1):
        self.factor, self.asked = factor, []

    def request(self, samples):
        self.asked += [sample.tokens.tolist() for sample in samples]
        return [sample.tokens[sample.prompt_length :] * self.factor for sample in samples]


def group(number, *rewards):
    responses = [list(range(1, 2 + i)) for i in range(len(rewards))]
    return Group(
        number,
        0,
        [
            Rollout(PROMPT, tokens, [-1.0] * len(tokens), "stop", [], reward=reward)
            for tokens, reward in zip(responses, rewards, strict=True)
        ],
    )


def test_only_groups_that_are_trained_on_are_scored():
    teacher, mixed, equal, held_out = Teacher(), group(1, 0.0, 1.0), group(1, 1.0, 1.0), group(EVALUATION, 0.0, 1.0)
    ask_teacher([mixed, equal, held_out], teacher, ObjectiveConfig(name="trrd"), 100)
    assert teacher.asked == [[7, 8, 1], [7, 8, 1, 2]]
    assert [rollout.teacher_log_probs.tolist() for rollout in mixed.rollouts] == [
        pytest.approx([-0.1]),
        pytest.approx([-0.1, -0.2]),
    ]
    assert all(rollout.teacher_log_probs is None for each in (equal, held_out) for rollout in each.rollouts)
    ask_teacher([held_out], teacher, ObjectiveConfig(name="trrd"), 100)
    assert len(teacher.asked) == 2


def test_responses_that_are_filtered_out_are_not_scored():
    teacher, mixed = Teacher(), group(1, 0.0, 1.0, 2.0)
    mixed.rollouts[1].finish_reason = "length"
    ask_teacher([mixed], teacher, ObjectiveConfig(name="kdrl", overlong_filter=True), 100)
    assert teacher.asked == [[7, 8, 1], [7, 8, 1, 2, 3]]


def test_log_probs_that_are_not_finite_end_the_run():
    with pytest.raises(TrainingError, match="teacher_log_probs of sample 0 is nan"):
        ask_teacher([group(1, 0.0, 1.0)], Teacher(torch.nan), ObjectiveConfig(name="trrd"), 100)


def test_requests_have_about_the_tokens_that_they_may():
    teacher, groups = Teacher(), [group(1, 0.0, 1.0, 2.0) for _ in range(3)]  # 3, 4 and 5 tokens each
    sizes = []
    request = teacher.request
    teacher.request = lambda samples: sizes.append([sample.tokens.numel() for sample in samples]) or request(samples)
    ask_teacher(groups, teacher, ObjectiveConfig(name="trrd"), 10)
    assert sizes == [[3, 4, 5], [3, 4, 5], [3, 4], [5]]
    assert len({tuple(rollout.teacher_log_probs.tolist()) for each in groups for rollout in each.rollouts}) == 3
