"""Accuracy, Mean@K and the unbiased Pass@K."""

from itertools import combinations

import pytest

from rlad_megatron.rewards.accuracy import accuracy_metrics, pass_at_k
from rlad_megatron.types import Prompt, Rollout


@pytest.mark.parametrize("samples", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_solution(samples):
    for solved in range(samples + 1):
        outcomes = [1] * solved + [0] * (samples - solved)
        for k in range(1, samples + 1):
            subsets = list(combinations(outcomes, k))
            assert pass_at_k(samples, solved, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def group(subset, outcomes):
    prompt = Prompt(id="x", tokens=(1,), answer="", subset=subset, text="")
    return [Rollout(prompt, [1, 2], [0.0, 0.0], "stop", [], solved=bool(outcome)) for outcome in outcomes]


def test_metrics_by_subset():
    metrics = accuracy_metrics([group("PPL2", [1, 1, 0, 0]), group("PPL2", [1, 1, 1, 1]), group("PPL3", [0, 0, 0, 1])])
    assert metrics["eval/accuracy"] == metrics["eval/mean@4"] == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert metrics["eval/accuracy/PPL2"] == 0.75
    assert metrics["eval/accuracy/PPL3"] == 0.25
    assert metrics["eval/pass@4"] == 1.0
    assert metrics["eval/pass@2"] == pytest.approx((5 / 6 + 1 + 1 / 2) / 3)
    assert "eval/pass@1" not in metrics


def test_one_subset_and_one_sample_give_one_figure():
    metrics = accuracy_metrics([group("PPL2", [1]), group("PPL2", [0])])
    assert metrics == {"eval/accuracy": 0.5, "eval/response_tokens": 2.0}
