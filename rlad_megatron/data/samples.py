"""From rollouts or traces to samples ready for the trainer: advantages and token weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.errors import DataError, TrainingError
from rlad_megatron.objectives.advantages import group_advantages
from rlad_megatron.objectives.aggregate import token_weights
from rlad_megatron.objectives.registry import objective_for
from rlad_megatron.types import Prompt, Rollout, Sample


def split_into_updates(groups: list[list[Rollout]], updates: int) -> list[list[list[Rollout]]]:
    """Whole groups for each optimizer update, in order; `updates` divides their number (config.validate)."""
    size = len(groups) // updates
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def samples_from_rollouts(groups: list[list[Rollout]], objective: ObjectiveConfig) -> list[Sample]:
    """The samples of one optimizer update.

    Groups with equal rewards teach nothing under a group-relative objective: they count in the mean but make no
    sample, unless the objective has another source of gradient. Sample weights sum to the share that is left.
    """
    rewards_PG = torch.tensor([[rollout.reward for rollout in group] for group in groups])
    advantages_PG, kept_P = group_advantages(rewards_PG)
    lengths = [len(rollout.tokens) for group in groups for rollout in group]
    weights = iter(token_weights(lengths, objective.aggregation))
    drop = objective_for(objective.name).drops_zero_advantage
    samples = []
    for group, advantages_G, kept in zip(groups, advantages_PG.tolist(), kept_P.tolist(), strict=True):
        for rollout, advantage in zip(group, advantages_G, strict=True):
            weight = next(weights)
            if kept or not drop:
                samples.append(
                    Sample(
                        tokens=torch.tensor([*rollout.prompt.tokens, *rollout.tokens]),
                        prompt_length=len(rollout.prompt.tokens),
                        weight=weight,
                        advantage=advantage,
                        sampler_log_probs=torch.tensor(rollout.log_probs),
                    )
                )
    return samples


def samples_from_rollout_files(folder: Path) -> list[Sample]:
    """The rollouts that a run has kept (`observe/rollouts.py:write_rollouts`), in the order of their steps.

    Every token weighs 1.

    Raises:
        DataError: there are none, or they were written without tokens.
    """
    samples = []
    for file in sorted(folder.glob("step_*.jsonl")):
        for line in file.read_text().splitlines():
            rollout = json.loads(line)
            if "response_tokens" not in rollout:
                raise DataError(
                    f"{file}: rollouts without tokens, of an earlier version; make new ones with `rlad train`"
                )
            samples.append(
                Sample(
                    tokens=torch.tensor([*rollout["prompt_tokens"], *rollout["response_tokens"]]),
                    prompt_length=len(rollout["prompt_tokens"]),
                    weight=torch.ones(len(rollout["response_tokens"])),
                    advantage=rollout["advantage"],
                    sampler_log_probs=torch.tensor(rollout["log_probs"]),
                )
            )
    if not samples:
        raise DataError(f"{folder}: no rollouts; run `rlad train` first, with observe.rollouts_per_step above 0")
    return samples


def samples_from_traces(traces: list[tuple[Prompt, list[int]]], aggregation: str) -> list[Sample]:
    """The samples of one fine-tuning update."""
    weights = token_weights([len(response) for _, response in traces], aggregation)
    return [
        Sample(
            tokens=torch.tensor([*prompt.tokens, *response]),
            prompt_length=len(prompt.tokens),
            weight=weight,
        )
        for (prompt, response), weight in zip(traces, weights, strict=True)
    ]


# What to look at when a model gives log-probs that are not finite.
_SCORED_BY = {
    "teacher_log_probs": "look at the weights in teacher.path and at teacher.precision",
    "old_log_probs": "the student's weights are broken: resume from a checkpoint before this step",
}


def set_log_probs(samples: list[Sample], name: str, log_probs: list[torch.Tensor]) -> None:
    """Give the samples their "teacher_log_probs" or "old_log_probs", float32 [R] each, in nats.

    Raises:
        TrainingError: a value that is not finite. The log-prob of a sampled token is never -inf or NaN, and one such
            token would make every gradient of the update so.
    """
    for i, (sample, values_R) in enumerate(zip(samples, log_probs, strict=True)):
        if not torch.isfinite(values_R).all():
            place = int(torch.isfinite(values_R).logical_not().nonzero()[0])
            raise TrainingError(
                f"{name} of sample {i} is {values_R[place].item()} at response token {place} "
                f"(id {sample.tokens[sample.prompt_length + place].item()}); {_SCORED_BY[name]}"
            )
        setattr(sample, name, values_R)
