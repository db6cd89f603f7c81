"""What `rlad evaluate --teacher-gap` counts, and what it reads."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlad_megatron import platform
from rlad_megatron.config import Fp8Config, ObjectiveConfig, TeacherConfig
from rlad_megatron.config.recipe import load_run
from rlad_megatron.data.samples import samples_from_rollout_files
from rlad_megatron.errors import DataError, RladError
from rlad_megatron.models.precision import precision_of, reference_of
from rlad_megatron.observe.rollouts import write_rollouts
from rlad_megatron.types import Prompt, Rollout, Sample


@pytest.fixture(scope="module")
def gap():
    platform.prepare()
    from rlad_megatron.teacher import gap

    return gap


def sample(student, advantage):
    return Sample(
        tokens=torch.zeros(1 + len(student), dtype=torch.int64),
        prompt_length=1,
        weight=torch.ones(len(student)),
        advantage=advantage,
        sampler_log_probs=torch.tensor(student),
    )


def test_errors_and_flipped_decisions_by_hand(gap):
    samples = [sample([-1.0, -1.0, -1.0, -1.0], 2.0), sample([-1.0, -1.0], -2.0), sample([-1.0], 0.0)]
    # pi_S = pi_old, so the ratio is exp(0.5 * clamp(pi_S - pi_T, -1, 1)): above 1.28 from a gap of 0.494 on,
    # below 0.8 from -0.446 on. A positive advantage is clipped above, a negative one below.
    reference = [torch.tensor([-1.5, -1.0, -1.4, -2.1]), torch.tensor([-0.5, -1.6]), torch.tensor([-1.9])]
    own = [torch.tensor([-1.4, -1.0, -1.5, -1.9]), torch.tensor([-0.6, -1.6]), torch.tensor([-2.1])]
    found = SimpleNamespace(**gap.measure(samples, own, reference, ObjectiveConfig(alpha=0.5)))
    assert (found.rollouts, found.tokens, found.tokens_with_advantage) == (3, 7, 6)
    assert found.abs_mean == pytest.approx((0.1 + 0 + 0.1 + 0.2 + 0.1 + 0 + 0.2) / 7)
    assert found.abs_max == found.abs_p99 == pytest.approx(0.2)
    assert found.clamped == pytest.approx(1 / 7)  # -2.1
    assert found.clamp_flipped == pytest.approx(2 / 7)  # -2.1 to -1.9, and -1.9 to -2.1 of the sample without advantage
    assert found.clipped == pytest.approx(3 / 6)  # -1.5, -2.1, and -0.5 of the negative one
    assert found.clip_flipped == pytest.approx(3 / 6)  # -1.5 to -1.4, -1.4 to -1.5, and -0.5 to -0.6
    # At alpha 1 the teacher decides nothing.
    assert gap.measure(samples, own, reference, ObjectiveConfig(alpha=1.0))["clip_flipped"] == 0


def test_each_precision_is_compared_with_a_better_one():
    teacher = TeacherConfig("folder", fp8=Fp8Config(recipe="mxfp8"), offload=True)
    bf16 = reference_of(teacher)
    assert bf16 == replace(teacher, fp8=Fp8Config())
    fp32 = reference_of(bf16)
    assert (fp32.precision, fp32.transformer_impl, fp32.layout) == ("fp32", "local", teacher.layout)
    assert reference_of(fp32) is None
    assert precision_of(teacher) == "bf16 with FP8 (mxfp8, hybrid)"


def test_kept_rollouts_come_back_as_samples(tmp_path):
    def rollout(tokens, reward):
        log_probs = [-0.123456 * token for token in tokens]
        prompt = Prompt("kk/1", (7, 8, 9), "gold", "PPL2", "text")
        return Rollout(prompt, tokens, log_probs, "stop", 3, text="response", reward=reward)

    groups = [
        [rollout([1, 2], 1.0), rollout([5], 0.0)],
        [rollout([3], 0.5), rollout([4], 0.5)],
        [rollout([6], 1.0)] * 2,
    ]
    write_rollouts(tmp_path, 12, groups[:2], [None, None], pieces=str)
    first, second = samples_from_rollout_files(tmp_path / "rollouts")
    assert (first.tokens.tolist(), first.prompt_length) == ([7, 8, 9, 1, 2], 3)
    assert first.sampler_log_probs.tolist() == pytest.approx([-0.12346, -0.24691])
    assert (first.advantage, second.advantage, second.tokens[3].item()) == (1.0, 0.0, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["teacher.precision=fp32"],
            "teacher.precision=fp32 is the reference of the comparison; give .*precision=bf16",
        ),
        (
            ["teacher.precision=bf16", "teacher.layout.context_parallel=2", "train.gpus_per_node=8"],
            "teacher.layout.context_parallel=2: the reference of the comparison is in fp32, .*; use context_parallel=1",
        ),
        (["objective.name=grpo"], "objective.name=grpo has no teacher"),
        (["teacher.precision=bf16", "name=nowhere"], "nowhere/rollouts: no rollouts; run `rlad train` first"),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_rank_starts(overrides, message):
    from rlad_megatron.launch.preflight import check_teacher_gap

    with pytest.raises(RladError, match=message):
        check_teacher_gap(load_run("kk_tiny_cpu", overrides))


def test_rollouts_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"rollouts: no rollouts; run `rlad train`"):
        samples_from_rollout_files(tmp_path / "rollouts")
    (tmp_path / "step_00000001.jsonl").write_text(json.dumps({"prompt": "p", "response": "r"}) + "\n")
    with pytest.raises(DataError, match=r"step_00000001.jsonl: rollouts without tokens"):
        samples_from_rollout_files(tmp_path)
