"""The shares that explain TRRD, against autograd and plain loops over tokens, in float64."""

import pytest
import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.objectives.diagnostics import teacher_shares
from rlad_megatron.objectives.registry import surrogate_for
from rlad_megatron.types import TokenBatch

TOKENS = 600


def report(name, *, solved=True, **fields):
    """The shares under an objective, and what a token at a time is known of: A, gap, solved, gradients."""
    generator = torch.Generator().manual_seed(3)
    student = (-torch.rand(TOKENS, generator=generator, dtype=torch.float64) * 5).requires_grad_()
    old = student.detach() + 0.3 * torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    teacher = student.detach() + 0.2 + 1.5 * torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    advantage = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    advantage[::10] = 0
    is_solved = (torch.rand(TOKENS, generator=generator) < 0.3).double()
    mean = torch.zeros(TOKENS)
    solved_or_not = is_solved if solved else None
    batch = TokenBatch(torch.ones(TOKENS), advantage, None, teacher, old, response_mean=mean, solved=solved_or_not)
    config = ObjectiveConfig(name=name, **fields)
    pulls = []
    for objective in (name, "grpo"):
        surrogate, stats = surrogate_for(objective)(student, batch, config)
        pulls.append(torch.autograd.grad(surrogate.sum(), student)[0].abs().tolist())
        if objective == name:
            found = teacher_shares({"log_probs": student.detach(), **stats}, batch, config)
            clipped = stats.get("clipped", torch.zeros(TOKENS)).tolist()
    gap = (student.detach() - teacher).tolist()
    tokens = list(zip(advantage.tolist(), gap, is_solved.tolist(), clipped, *pulls, strict=True))
    return {name: tuple(value.tolist()) for name, value in found.items()}, tokens


def kind(advantage, gap):
    return f"{'positive' if advantage > 0 else 'negative'}_{'above' if gap > 0 else 'below'}"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_weight_and_clip_of_each_kind_of_token(alpha):
    found, tokens = report("trrd", alpha=alpha)
    for name in ("positive_above", "positive_below", "negative_above", "negative_below"):
        mine = [token for token in tokens if token[0] != 0 and kind(*token[:2]) == name]
        assert 50 < len(mine) < TOKENS / 2
        own, of_grpo = (sum(token[place] for token in mine) for place in (4, 5))
        assert found[f"trrd/weight_{name}"] == pytest.approx((own, of_grpo))
        assert found[f"trrd/clip_{name}"] == (sum(token[3] for token in mine), len(mine))
        if alpha == 1:
            assert own == of_grpo


@pytest.mark.parametrize("objective", ["trrd", "kdrl", "distilled_rl", "on_policy_kl"])
def test_the_gap_on_responses_solved_and_not(objective):
    found, tokens = report(objective)
    for name, wanted in (("solved", 1), ("unsolved", 0)):
        gaps = [gap for _, gap, is_solved, *_ in tokens if is_solved == wanted]
        assert found[f"trrd/teacher_gap_{name}"] == pytest.approx((sum(gaps), len(gaps)))


def test_what_an_objective_does_not_have_is_not_reported():
    assert report("grpo")[0] == {}
    assert {name.split("_")[0] for name in report("kdrl", solved=False)[0]} == {"trrd/clip"}
    assert set(report("on_policy_kl")[0]) == {"trrd/teacher_gap_solved", "trrd/teacher_gap_unsolved"}
