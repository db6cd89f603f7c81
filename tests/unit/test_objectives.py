"""The objectives against hand-computed cases and closed-form gradients in float64."""

import importlib
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rlad_megatron.config import OBJECTIVES, ObjectiveConfig
from rlad_megatron.objectives.advantages import group_advantages
from rlad_megatron.objectives.aggregate import token_weights
from rlad_megatron.objectives.cross_entropy import cross_entropy
from rlad_megatron.objectives.distilled_rl import distilled_rl
from rlad_megatron.objectives.entropy import EntropyBonus
from rlad_megatron.objectives.grpo import clipped_surrogate, grpo
from rlad_megatron.objectives.kdrl import kdrl
from rlad_megatron.objectives.mismatch import histogram_quantile, mismatch_stats, mismatch_weights
from rlad_megatron.objectives.on_policy_kl import on_policy_kl
from rlad_megatron.objectives.reference_kl import k3
from rlad_megatron.objectives.registry import STAT_METRICS, averaged_for, surrogate_for
from rlad_megatron.objectives.response_mean import response_mean
from rlad_megatron.objectives.trrd import trrd
from rlad_megatron.trainer.loss import token_loss
from rlad_megatron.types import TokenBatch

CLIP = {"eps_low": 0.2, "eps_high": 0.28}
TRRD = {"alpha": 0.5, "teacher_clamp": 1.0, **CLIP}


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_tokens(n=4096, dtype=torch.float64):
    """Student, old, teacher log-probs and advantages, wide enough to reach clip and clamp on both sides."""
    generator = torch.Generator().manual_seed(0)
    student = -torch.rand(n, generator=generator, dtype=dtype) * 5
    old = student + 0.3 * torch.randn(n, generator=generator, dtype=dtype)
    teacher = student + 1.5 * torch.randn(n, generator=generator, dtype=dtype)
    return student.requires_grad_(), old, teacher, torch.randn(n, generator=generator, dtype=dtype)


def token_batch(advantage, teacher, old):
    """One response."""
    batch = TokenBatch(torch.ones_like(advantage), advantage, teacher_log_probs=teacher, old_log_probs=old)
    mean = (teacher - old).clamp(-1, 1).detach().mean()
    return replace(batch, response_mean=mean.expand_as(advantage))


def gradient(surrogate, log_probs):
    return torch.autograd.grad(surrogate.sum(), log_probs)[0]


# ---------------------------------------------------------------- advantages


def test_advantages_by_hand():
    advantages_PG, kept_P = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, -1.0, 3.0, -1.0]]))
    # mean 1/4, population std sqrt(3)/4
    assert advantages_PG[0].tolist() == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3)
    assert advantages_PG[1].tolist() == [1.0, -1.0, 1.0, -1.0]
    assert kept_P.tolist() == [True, True] and advantages_PG.dtype == torch.float32


def test_advantages_without_the_std_by_hand():
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, -1.0, 3.0, -1.0], [0.1, 0.1, 0.1, 0.1]])
    advantages_PG, kept_P = group_advantages(rewards_PG, std=False)
    assert advantages_PG.tolist() == [[0.75, -0.25, -0.25, -0.25], [2.0, -2.0, 2.0, -2.0], [0.0] * 4]
    assert kept_P.tolist() == [True, True, False]


def test_equal_rewards_are_dropped_not_divided():
    rewards_PG = torch.tensor([[0.1] * 7, [0.0] * 7, [0.1] * 6 + [0.2]])
    advantages_PG, kept_P = group_advantages(rewards_PG)
    assert kept_P.tolist() == [False, False, True]
    assert torch.equal(advantages_PG[:2], torch.zeros(2, 7))
    assert advantages_PG[2].square().mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("rewards", [[1.0, 0.0], [[1.0, float("nan")]]])
def test_bad_rewards_are_refused(rewards):
    with pytest.raises(ValueError, match="rewards_PG"):
        group_advantages(torch.tensor(rewards))


# ---------------------------------------------------------------- TRRD and GRPO


def test_trrd_by_hand():
    student = column(-1.0, -1.0, -1.0, -1.0, -1.0).requires_grad_()
    old = column(-1.2, -1.0, -1.0, -1.4, -1.0)
    teacher = column(-1.4, -4.0, 0.0, -1.6, -1.0)  # gaps 0.4, 3 (clamped), -1 (at the bound), 0.6, 0
    advantage = column(-1.0, -2.0, 1.0, 1.0, 0.0)
    surrogate, stats = trrd(student, old, teacher, advantage, **TRRD)
    # log r = 0.5 * (0.2, 0, 0, 0.4, 0) + 0.5 * (0.4, 1, -1, 0.6, 0)
    ratio = column(0.3, 0.5, -0.5, 0.5, 0.0).exp()
    assert torch.allclose(stats["ratio"], ratio)
    # A < 0 keeps the larger ratio; A > 0 keeps the smaller one, and clips the larger one at 1.28
    assert torch.allclose(surrogate, torch.stack([-ratio[0], -2 * ratio[1], ratio[2], column(1.28)[0], column(0)[0]]))
    assert stats["clipped"].tolist() == [False, False, False, True, False]
    assert stats["clamped"].tolist() == [False, True, False, False, False]
    assert torch.allclose(stats["teacher_gap"], column(0.4, 3.0, -1.0, 0.6, 0.0))
    # d log r / d log pi_S is 1, and alpha alone where the clamp binds
    expected = torch.stack([-ratio[0], -ratio[1], ratio[2], column(0)[0], column(0)[0]])
    assert torch.allclose(gradient(surrogate, student), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_trrd_gradient_is_the_closed_form(alpha):
    student, old, teacher, advantage = random_tokens()
    surrogate, stats = trrd(student, old, teacher, advantage, **TRRD | {"alpha": alpha})
    gap = (student - teacher).detach()
    ratio = (alpha * (student - old) + (1 - alpha) * gap.clamp(-1, 1)).exp().detach()
    clipped = ((advantage > 0) & (ratio > 1.28)) | ((advantage < 0) & (ratio < 0.8))
    slope = alpha + (1 - alpha) * (gap.abs() <= 1).double()
    assert torch.equal(stats["clipped"], clipped) and 0.05 < clipped.double().mean() < 0.95
    assert torch.equal(stats["clamped"], gap.abs() > 1) and 0.05 < stats["clamped"].double().mean() < 0.95
    assert torch.allclose(surrogate, torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage))
    expected = torch.where(clipped, 0.0, ratio * advantage * slope)
    assert torch.allclose(gradient(surrogate, student), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("teacher_scale", [1.0, 1e30, float("nan")])
def test_trrd_at_alpha_1_is_grpo_bit_for_bit(teacher_scale):
    student, old, teacher, advantage = random_tokens(dtype=torch.float32)
    surrogate, stats = trrd(student, old, teacher * teacher_scale, advantage, **TRRD | {"alpha": 1.0})
    expected, expected_stats = grpo(student, old, advantage, **CLIP)
    assert torch.equal(surrogate, expected)
    assert torch.equal(gradient(surrogate, student), gradient(expected, student))
    assert torch.equal(stats["ratio"], expected_stats["ratio"])
    assert torch.equal(stats["clipped"], expected_stats["clipped"])


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_ratio_beyond_float32_gives_no_nan(alpha):
    """Log-ratios of -400 to 400: the clip cuts the large ones where A > 0, the bound does where A < 0."""
    student = torch.tensor([-1.0, -1.0, -1.0, -801.0, -801.0, -1.0]).requires_grad_()
    old = torch.tensor([-801.0, -801.0, -801.0, -1.0, -1.0, -1.0])
    advantage = torch.tensor([2.0, 0.0, -2.0, 2.0, -2.0, 2.0])
    surrogate, stats = trrd(student, old, student.detach(), advantage, **TRRD | {"alpha": alpha})
    assert surrogate[[0, 1, 3, 4, 5]].tolist() == pytest.approx([2.56, 0.0, 0.0, -1.6, 2.0])
    assert surrogate[2] < -1e34 and surrogate.isfinite().all() and stats["ratio"].isfinite().all()
    assert stats["clipped"].tolist() == [True, False, False, False, True, False]
    assert gradient(surrogate, student).tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 2.0]


def test_the_bound_of_the_ratio_changes_no_bit_within():
    log_ratio = torch.cat([torch.linspace(-100, 80, 1001), torch.linspace(-1, 1, 1001)]).requires_grad_()
    advantage = torch.randn(2002, generator=torch.Generator().manual_seed(0))
    ratio = log_ratio.exp()
    expected = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    surrogate, stats = clipped_surrogate(log_ratio, advantage, **CLIP)
    assert torch.equal(surrogate, expected) and torch.equal(stats["ratio"], ratio)
    assert torch.equal(gradient(surrogate, log_ratio), gradient(expected, log_ratio))


def test_clamp_cuts_the_teacher_gradient():
    """At alpha 0 a token whose clamp binds has no gradient at all."""
    student = column(-1.0, -1.0).requires_grad_()
    surrogate, _ = trrd(student, student.detach(), column(-3.0, -1.1), column(-1.0, -1.0), **TRRD | {"alpha": 0.0})
    cut, kept = gradient(surrogate, student)
    assert cut == 0 and kept != 0


def test_only_the_student_carries_gradient():
    student, old, teacher, advantage = random_tokens(64)
    for name in OBJECTIVES:
        given = (advantage, teacher, old)
        leaves = [value.clone().requires_grad_() for value in given]
        batch = token_batch(*leaves)
        surrogate, stats = surrogate_for(name)(student, batch, ObjectiveConfig())
        surrogate.sum().backward()
        assert surrogate.shape == student.shape, name
        assert all(leaf.grad is None for leaf in leaves), name
        assert not any(stat.requires_grad for stat in stats.values()), name
        assert all(stat.shape == student.shape for stat in stats.values()), name
        assert set(stats) <= set(STAT_METRICS), name


def test_an_objective_uses_what_its_traits_say():
    student, old, teacher, advantage = random_tokens(64)
    batch = token_batch(advantage, teacher, old)
    for name, traits in OBJECTIVES.items():
        surrogate, _ = surrogate_for(name)(student, batch, ObjectiveConfig())
        assert hasattr(importlib.import_module(f"rlad_megatron.objectives.{name}"), "averaged") == (
            traits.averages_over_responses
        )
        for field, is_needed in (
            ("teacher_log_probs", traits.needs_teacher),
            ("advantage", traits.needs_advantage),
            ("response_mean", traits.averages_over_responses),
        ):
            other = replace(batch, **{field: -getattr(batch, field)})
            changed = not torch.equal(surrogate_for(name)(student, other, ObjectiveConfig())[0], surrogate)
            assert changed == is_needed, (name, field)


def test_zero_advantage_has_zero_gradient_where_groups_may_be_dropped():
    student, old, teacher, advantage = random_tokens(64)
    batch = token_batch(torch.zeros_like(advantage), teacher, old)
    for name, traits in OBJECTIVES.items():
        surrogate, _ = surrogate_for(name)(student, batch, ObjectiveConfig())
        has_gradient = bool(gradient(surrogate, student).any())
        assert has_gradient != traits.drops_zero_advantage, name


# ---------------------------------------------------------------- the other objectives


def test_kdrl_is_grpo_minus_k2():
    student, old, teacher, advantage = random_tokens()
    surrogate, stats = kdrl(student, old, teacher, advantage, kl_coefficient=0.25, **CLIP)
    base, _ = grpo(student, old, advantage, **CLIP)
    gap = (student - teacher).detach()
    assert torch.allclose(surrogate, base - 0.25 * gap**2 / 2)
    assert torch.allclose(gradient(surrogate, student), gradient(base, student) - 0.25 * gap)
    assert torch.equal(stats["teacher_gap"], gap)


@pytest.mark.parametrize("name", ["kdrl", "on_policy_kl"])
def test_expected_gradient_is_that_of_the_reverse_kl(name):
    """Summed over all tokens with their probabilities, the sampled objective gives the exact gradient of -KL."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    student = torch.log_softmax(logits, 0)
    teacher = torch.log_softmax(torch.randn(11, generator=generator, dtype=torch.float64), 0)
    zeros = torch.zeros(11, dtype=torch.float64)
    batch = TokenBatch(zeros, zeros, teacher_log_probs=teacher).with_old(student)
    surrogate, _ = surrogate_for(name)(student, batch, ObjectiveConfig(kl_coefficient=1.0))
    (got,) = torch.autograd.grad((student.detach().exp() * surrogate).sum(), logits, retain_graph=True)
    (want,) = torch.autograd.grad(-(student.exp() * (student - teacher)).sum(), logits)
    assert torch.allclose(got, want)


def test_on_policy_kl_gradient():
    student, old, teacher, _ = random_tokens()
    surrogate, stats = on_policy_kl(student, old, teacher)
    ratio, gap = (student - old).exp().detach(), (student - teacher).detach()
    assert torch.allclose(surrogate, -ratio * gap)
    assert torch.allclose(gradient(surrogate, student), -ratio * gap)
    assert torch.equal(stats["teacher_gap"], gap)


def test_k3_is_the_formula_and_its_mean_the_kl_to_the_reference():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    student = torch.log_softmax(logits, 0)
    reference = torch.log_softmax(torch.randn(11, generator=generator, dtype=torch.float64), 0).requires_grad_()
    ratio = (reference - student).detach().exp()
    estimate = k3(student, reference)
    assert torch.allclose(estimate, ratio - ratio.log() - 1) and (estimate >= 0).all()
    (got,) = torch.autograd.grad(estimate.sum(), student, retain_graph=True)
    assert torch.allclose(got, 1 - ratio)
    mean = (student.detach().exp() * estimate).sum()
    assert torch.allclose(mean, (student.exp() * (student - reference)).sum())
    assert not k3(student.detach(), reference).requires_grad, "the reference gets no gradient"
    assert k3(torch.tensor([-200.0]), torch.tensor([0.0])).isfinite().all()


def test_the_loss_takes_the_kl_to_the_reference_off_the_surrogate():
    student, reference, _, advantage = random_tokens(64)
    weight = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = TokenBatch(weight, advantage, reference_log_probs=reference)
    tokens = slice(8, 40)
    loss, stats = token_loss(batch, ObjectiveConfig("grpo", reference_kl=0.3))(student[tokens], student[tokens], tokens)
    plain, measured = token_loss(batch, ObjectiveConfig("grpo"))(student[tokens], student[tokens], tokens)
    kl = k3(student, reference)[tokens]
    assert torch.equal(measured["reference_kl"], kl)
    assert torch.equal(
        plain,
        token_loss(replace(batch, reference_log_probs=None), ObjectiveConfig("grpo"))(
            student[tokens], student[tokens], tokens
        )[0],
    )
    assert torch.allclose(loss, plain + 0.3 * (weight[tokens] * kl))
    assert torch.equal(stats["reference_kl"], kl) and not stats["reference_kl"].requires_grad


def test_gspo_is_the_ratio_of_whole_responses():
    """Value and gradient against eq. 5 and 7 of arXiv 2507.18071, written for each response."""
    lengths, advantages = [3, 5, 2, 4], [1.0, -1.0, 0.5, -2.0]
    student, old, _, _ = random_tokens(sum(lengths))
    response = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    weight = torch.cat(token_weights(lengths, "sequence_mean")).double()
    advantage = torch.tensor(advantages, dtype=torch.float64)[response]
    batch = TokenBatch(weight, advantage, old_log_probs=old)
    log_ratio = response_mean(student - old, response, torch.tensor(lengths))
    config = ObjectiveConfig("grpo", ratio="sequence", eps_low=0.1, eps_high=0.15)
    loss, stats = token_loss(replace(batch, response_mean=log_ratio), config)(student, student, slice(None))
    want, cut = 0.0, []
    for ours, theirs, a in zip(student.split(lengths), old.split(lengths), advantages, strict=True):
        s = ((ours - theirs).sum() / len(ours)).exp()
        want = want - torch.minimum(s * a, s.clamp(0.9, 1.15) * a) / 4
        cut += [bool((s.clamp(0.9, 1.15) * a) < s * a)] * len(ours)
    assert torch.allclose(loss.sum(), want, rtol=1e-6) and stats["clipped"].tolist() == cut
    assert True in cut and False in cut
    assert torch.allclose(gradient(loss, student), gradient(want, student), rtol=1e-6)


def test_distilled_rl_is_the_equation_of_its_paper():
    """Value and gradient, written for each response."""
    lengths, advantages = [3, 5, 2, 40], [1.0, -1.0, 0.5, 2.0]
    student, old, teacher, _ = random_tokens(sum(lengths))
    response = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    batch = TokenBatch(torch.ones(50), torch.tensor(advantages, dtype=torch.float64)[response], None, teacher, old)
    config = ObjectiveConfig("distilled_rl", teacher_clamp=math.log(3), eps_low=0.2, eps_high=0.28)
    mean = response_mean(averaged_for("distilled_rl")(batch, config), response, torch.tensor(lengths))
    surrogate, stats = surrogate_for("distilled_rl")(student, replace(batch, response_mean=mean), config)
    want, weights = [], []
    parts = (values.split(lengths) for values in (student, old, teacher))
    for ours, before, theirs, a in zip(*parts, advantages, strict=True):
        rho = (theirs - before).exp().clamp(1 / 3, 3)
        w = rho / rho.prod() ** (1 / len(rho)) if a > 0 else torch.ones_like(rho)
        r = (ours - before).exp()
        want += torch.minimum(r * w * a, r.clamp(0.8, 1.28) * w * a)
        weights += w.detach().tolist() if a > 0 else []
    want = torch.stack(want)
    assert min(weights) < 0.6 and max(weights) > 1.6 and stats["clipped"].any()
    assert torch.allclose(surrogate, want, rtol=1e-6)
    assert torch.allclose(gradient(surrogate, student), gradient(want, student), rtol=1e-6)
    assert torch.equal(stats["clamped"], (teacher - old).abs() > math.log(3)) and stats["clamped"].any()
    assert torch.equal(stats["teacher_gap"], student.detach() - teacher)


def test_distilled_rl_is_grpo_with_a_teacher_that_is_the_student():
    student, old, _, advantage = random_tokens()
    surrogate, _ = distilled_rl(student, old, old, advantage, torch.zeros_like(old), teacher_clamp=1.0, **CLIP)
    assert torch.equal(surrogate, grpo(student, old, advantage, **CLIP)[0])


def test_the_mean_of_a_response_that_is_cut_over_ranks_is_that_of_the_whole():
    value, response = column(0.5, -0.1, 0.3, 0.9, 0.2), torch.tensor([0, 0, 2, 2, 2])
    length = torch.tensor([2, 0, 3])
    whole = response_mean(value, response, length)
    assert whole.tolist() == pytest.approx([0.2] * 2 + [1.4 / 3] * 3)
    mine, others = torch.tensor([0, 3]), torch.tensor([1, 2, 4])
    sums = []
    response_mean(value[others], response[others], length, lambda found: sums.append(found.clone()))
    part = response_mean(value[mine], response[mine], length, lambda found: found.add_(sums[0]))
    assert torch.equal(part, whole[mine])


def test_the_entropy_bonus_grows_below_its_target_and_acts_only_there():
    bonus = EntropyBonus(ObjectiveConfig("grpo", entropy_coefficient=0.01, entropy_target=0.5, entropy_step=0.004))
    weights = []
    for entropy in (0.3, 0.5, 0.6, 0.4, 2.0, 2.0, 2.0, 2.0, 0.1):
        weights.append(bonus.weight)
        bonus.measured(entropy)
    # Before any measurement none; c is 0.014 after 0.3, 0.010 after 0.5 (not below), 0.006 after 0.6, 0.010 after 0.4.
    assert weights == pytest.approx([0.0, 0.014, 0.010, 0.0, 0.010, 0.0, 0.0, 0.0, 0.0])
    assert bonus.weight == pytest.approx(0.004)  # it had fallen to 0, not below
    again = EntropyBonus(ObjectiveConfig("grpo", entropy_coefficient=0.01, entropy_target=0.5))
    again.load_state_dict(bonus.state_dict())
    assert again.weight == bonus.weight and again.enabled


def test_a_constant_entropy_bonus_is_the_configurations_also_after_a_resume():
    bonus = EntropyBonus(ObjectiveConfig("grpo", entropy_coefficient=0.01))
    bonus.measured(0.1)
    changed = EntropyBonus(ObjectiveConfig("grpo", entropy_coefficient=0.02))
    changed.load_state_dict(bonus.state_dict())
    assert bonus.weight == 0.01 and changed.weight == 0.02
    assert not EntropyBonus(ObjectiveConfig("grpo")).enabled


def test_cross_entropy_is_the_log_prob():
    student = column(-1.0, -2.0).requires_grad_()
    surrogate, stats = cross_entropy(student)
    assert surrogate is student and stats == {}


# ---------------------------------------------------------------- registry


def test_an_unknown_objective_is_refused():
    for name in ("ppo", "aggregate"):
        with pytest.raises(ValueError, match=rf"'{name}' is unknown; choose one of: trrd, grpo"):
            surrogate_for(name)


def test_without_old_log_probs_the_student_of_this_forward_stands_in():
    student, old, _, advantage = random_tokens()
    batch = TokenBatch(torch.ones_like(advantage), advantage)
    surrogate, stats = surrogate_for("grpo")(student, batch.with_old(student), ObjectiveConfig())
    assert torch.equal(stats["ratio"], torch.ones_like(student))
    assert torch.equal(gradient(surrogate, student), advantage)
    assert replace(batch, old_log_probs=old).with_old(student).old_log_probs is old


def test_objectives_import_torch_alone():
    code = (
        "import sys, rlad_megatron.objectives.registry, rlad_megatron.objectives.aggregate, "
        "rlad_megatron.objectives.advantages, rlad_megatron.objectives.mismatch;"
        "print([m for m in sys.modules if m.split('.')[0] in ('megatron', 'vllm', 'transformers')"
        " or m.startswith('rlad_megatron.') and m.split('.')[1] not in ('objectives', 'types', 'config', 'errors')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---------------------------------------------------------------- mismatch


def test_mismatch_weights_by_hand():
    old = column(0.0, 0.5, 3.0, -3.0).requires_grad_()
    sampler = column(0.0, 0.0, 0.0, 0.0)
    for correction, expected in (
        ("none", column(1.0, 1.0, 1.0, 1.0)),
        ("truncated_is", column(1.0, math.exp(0.5), 2.0, math.exp(-3))),
        ("icepop", column(1.0, math.exp(0.5), 0.0, 0.0)),
    ):
        weights = mismatch_weights(old, sampler, correction=correction, cap=2.0)
        assert torch.allclose(weights, expected) and not weights.requires_grad
    with pytest.raises(ValueError, match="choose one of: none, truncated_is, icepop"):
        mismatch_weights(old, sampler, correction="tis", cap=2.0)
    with pytest.raises(ValueError, match="mismatch_cap"):
        mismatch_weights(old, sampler, correction="icepop", cap=0.5)


def test_mismatch_stats_combine():
    old, sampler = column(-1.0, -2.0, -3.0), column(-1.5, -2.0, -2.0)
    parts = [mismatch_stats(old[s], sampler[s]) for s in (slice(0, 3), slice(0, 1), slice(1, 3), slice(3, 3))]
    whole, *others = parts
    assert whole[:2] == (1.5, 1.0)
    sums, maxima, histograms = zip(*others, strict=True)
    assert sum(sums) == 1.5 and max(maxima) == 1.0
    assert torch.equal(sum(histograms), whole[2]) and whole[2].sum() == 3


def test_the_quantile_of_a_histogram_is_within_a_tenth():
    gap = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).pow(4) * 3
    histogram = mismatch_stats(gap, torch.zeros_like(gap))[2]
    for share in (0.5, 0.9, 0.99):
        exact = gap.quantile(share).item()
        assert exact * 0.99 <= histogram_quantile(histogram, share) <= exact * 1.1
    extremes = mismatch_stats(torch.tensor([0.0] * 98 + [1e3] * 2), torch.zeros(100))[2]
    assert histogram_quantile(extremes, 0.5) == pytest.approx(1e-7) and histogram_quantile(extremes, 0.99) >= 100


def test_the_loss_is_corrected_for_the_mismatch():
    student, sampler, _, advantage = random_tokens(64)
    weight = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = ObjectiveConfig(name="grpo", mismatch_correction="icepop", mismatch_cap=1.2)
    factor = mismatch_weights(student, sampler, correction="icepop", cap=1.2)
    assert 0 < factor.count_nonzero() < 64
    tokens = slice(8, 40)
    loss, _ = token_loss(TokenBatch(weight, advantage, sampler), config)(student[tokens], student[tokens], tokens)
    assert torch.equal(loss, (-weight * factor * advantage)[tokens])  # pi_old is the student, so the ratio is 1


# ---------------------------------------------------------------- aggregation

LENGTHS = [5, 1, 9, 4]


def test_aggregation_is_the_mean_it_says():
    surrogates = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]

    def total(weights):
        return sum((w * s).sum() for w, s in zip(weights, surrogates, strict=True))

    by_sequence = token_weights(LENGTHS, "sequence_mean")
    assert [w.shape[0] for w in by_sequence] == LENGTHS and by_sequence[0].dtype == torch.float32
    assert torch.allclose(total(by_sequence), torch.stack([s.mean() for s in surrogates]).mean())
    assert torch.allclose(total(token_weights(LENGTHS, "token_mean")), torch.cat(surrogates).mean())
    sums = torch.stack([s.sum() for s in surrogates])
    assert torch.allclose(total(token_weights(LENGTHS, "fixed_length", (6, 20))), sums.sum() / 6 / 20)


def test_an_empty_response_counts_and_has_no_weight():
    weights = token_weights([0, 2], "sequence_mean")
    assert weights[0].shape == (0,) and weights[1].tolist() == [0.25, 0.25]


def test_bad_aggregation_is_refused():
    with pytest.raises(ValueError, match="choose one of: sequence_mean, token_mean, fixed_length"):
        token_weights([1], "mean")
    with pytest.raises(ValueError, match="longest possible length"):
        token_weights([1], "fixed_length")
    with pytest.raises(ValueError, match="response_lengths"):
        token_weights([-1], "token_mean")
