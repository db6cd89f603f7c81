"""From rollouts or traces to samples ready for the trainer: advantages and token weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.errors import DataError, TrainingError
from rlad_megatron.objectives.advantages import group_advantages
from rlad_megatron.objectives.aggregate import token_weights
from rlad_megatron.types import Prompt, Rollout, Sample


def trained_rollouts(group: list[Rollout], objective: ObjectiveConfig) -> list[Rollout]:
    """The rollouts of a group that give samples.

    None if the group's rewards are equal and the objective drops advantages of 0. With `objective.overlong_filter`
    only those that the model ended; the others still count in the group's mean reward (DAPO, arXiv 2503.14476).
    """
    same = all(rollout.reward == group[0].reward for rollout in group)
    if same and objective.drops_zero_advantage:
        return []
    return [rollout for rollout in group if not (objective.overlong_filter and rollout.finish_reason == "length")]


def samples_from_rollouts(
    groups: list[list[Rollout]], objective: ObjectiveConfig, whole: tuple[int, int] | None = None
) -> list[Sample]:
    """The samples of one optimizer update, or of a part of it (`whole`: as in `token_weights`).

    Responses that give no sample (`trained_rollouts`) count in the mean. Sample weights sum to the share of the batch
    that is trained on.
    """
    rewards_PG = torch.tensor([[rollout.reward for rollout in group] for group in groups], dtype=torch.float64)
    advantages_PG, _ = group_advantages(rewards_PG, std=objective.advantage_std)
    rollouts = [rollout for group in groups for rollout in group]
    weights = token_weights([len(rollout.tokens) for rollout in rollouts], objective.aggregation, whole)
    trained = {id(rollout) for group in groups for rollout in trained_rollouts(group, objective)}
    return [
        replace(
            _sample(rollout.prompt.tokens, rollout.tokens, weight, advantage, rollout.log_probs),
            teacher_log_probs=rollout.teacher_log_probs,
            experts=_as_tensor(rollout.experts),
            solved=rollout.solved,
        )
        for rollout, weight, advantage in zip(rollouts, weights, advantages_PG.flatten().tolist(), strict=True)
        if id(rollout) in trained
    ]


def first_sample(group: list[Rollout], samples: list[Sample], objective: ObjectiveConfig) -> Sample | None:
    """Of a group's samples, that of its first rollout, which the run keeps; None if it is not trained on."""
    trained = trained_rollouts(group, objective) if samples else []
    return samples[0] if trained and trained[0] is group[0] else None


def samples_from_rollout_files(folder: Path) -> list[Sample]:
    """The rollouts a run has kept (`observe/rollouts.py:write_rollouts`), in the order of their steps.

    Every token has weight 1.

    Raises:
        DataError: the folder has none, a line is not whole, or they were written without tokens.
    """
    samples = []
    for file in sorted(folder.glob("step_*.jsonl")):
        for line in filter(None, file.read_text(encoding="utf-8").split("\n")):  # texts hold other separators
            try:
                rollout = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{file}: a line is not whole ({error}); remove the file, or wait for its run"
                ) from error
            if "response_tokens" not in rollout:
                raise DataError(
                    f"{file}: rollouts without tokens, from an earlier version; make new ones with `rlad train`"
                )
            prompt, response = rollout["prompt_tokens"], rollout["response_tokens"]
            weight = torch.ones(len(response))
            samples.append(_sample(prompt, response, weight, rollout["advantage"], rollout["log_probs"]))
    if not samples:
        raise DataError(f"{folder}: no rollouts; run `rlad train` first, with observe.rollouts_per_step above 0")
    return samples


def samples_from_traces(traces: list[tuple[Prompt, list[int]]], aggregation: str) -> list[Sample]:
    """The samples of one fine-tuning update."""
    weights = token_weights([len(response) for _, response in traces], aggregation)
    return [
        _sample(prompt.tokens, response, weight) for (prompt, response), weight in zip(traces, weights, strict=True)
    ]


def sample_to_score(prompt: Sequence[int], response: Sequence[int], experts: np.ndarray | None = None) -> Sample:
    """A sample with weight 0, for models that only score it. experts: as in `Rollout`."""
    return replace(_sample(prompt, response, torch.zeros(len(response))), experts=_as_tensor(experts))


def _sample(
    prompt: Sequence[int],
    response: Sequence[int],
    weight: torch.Tensor,
    advantage: float = 0.0,
    log_probs: list[float] | None = None,
) -> Sample:
    sampler_log_probs = None if log_probs is None else torch.tensor(log_probs)
    return Sample(torch.tensor([*prompt, *response]), len(prompt), weight, advantage, sampler_log_probs)


def _as_tensor(experts: np.ndarray | None) -> torch.Tensor | None:
    return None if experts is None else torch.from_numpy(experts)


def set_log_probs(
    samples: list[Sample],
    *,
    teacher: list[torch.Tensor] | None = None,
    old: list[torch.Tensor] | None = None,
    reference: list[torch.Tensor] | None = None,
) -> None:
    """Store the log-probs of the teacher, of pi_old or of pi_ref in the samples, float32 [R] each, in nats.

    Raises:
        TrainingError: a value that is not finite. The log-prob of a sampled token is never -inf or NaN, and one such
            token would spoil every gradient of the update.
    """
    if teacher is not None:
        _require_finite("teacher", samples, teacher, "check the weights in teacher.path and teacher.precision")
        for sample, values_R in zip(samples, teacher, strict=True):
            sample.teacher_log_probs = values_R
    if old is not None:
        _require_finite("old", samples, old, "the student's weights are broken: resume from an earlier checkpoint")
        for sample, values_R in zip(samples, old, strict=True):
            sample.old_log_probs = values_R
    if reference is not None:
        _require_finite("reference", samples, reference, "check the weights in student.path and student.precision")
        for sample, values_R in zip(samples, reference, strict=True):
            sample.reference_log_probs = values_R


def _require_finite(name: str, samples: list[Sample], log_probs: list[torch.Tensor], remedy: str) -> None:
    for i, (sample, values_R) in enumerate(zip(samples, log_probs, strict=True)):
        if not torch.isfinite(values_R).all():
            place = int(torch.isfinite(values_R).logical_not().nonzero()[0])
            raise TrainingError(
                f"{name}_log_probs of sample {i} is {values_R[place].item()} at response token {place} "
                f"(id {sample.tokens[sample.prompt_length + place].item()}); {remedy}"
            )
