"""The frozen teacher: a Megatron model with its own layout that only scores given tokens.

It runs on the trainer's ranks, or on dedicated ranks (`service.py`, `client.py`). The starting student, to
which `objective.reference_kl` compares, is built and scored in the same way, on the trainer's ranks.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from rlad_megatron import platform
from rlad_megatron.config import RunConfig, TeacherConfig
from rlad_megatron.models.build import HiddenStatesModel, build_loaded_model
from rlad_megatron.models.forward import score_samples
from rlad_megatron.models.load import stored_bytes
from rlad_megatron.models.precision import token_multiple
from rlad_megatron.models.shard_plan import build_shard_plan
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.teacher.offload import HostWeights
from rlad_megatron.types import Sample


@dataclass
class Teacher:
    """Scores the student's tokens. `log_probs` is collective over all ranks."""

    config: RunConfig
    groups: ModelGroups
    chunks: list[HiddenStatesModel]  # this rank's part of the model
    # Its own, as in transformers: models of a family differ in unused rows.
    vocab_size: int
    token_multiple: int
    host_weights: HostWeights | None
    stopwatch: platform.Stopwatch = field(default_factory=platform.Stopwatch)  # of this rank's own work

    def memory(self) -> dict[str, int]:
        """Bytes on this rank's device between passes."""
        parameters = (parameter for chunk in self.chunks for parameter in chunk.parameters())
        return {"teacher": 0 if self.host_weights else sum(map(stored_bytes, parameters))}

    def log_probs(self, samples: list[Sample]) -> list[torch.Tensor]:
        """Teacher log-probs of each sample's response, float32 [R] in nats, on every rank."""
        with self.host_weights.on_device() if self.host_weights else nullcontext():
            self.stopwatch.start()
            return score_samples(
                self.chunks,
                self.groups,
                samples,
                vocab_size=self.vocab_size,
                temperature=self.config.rollout.sampling.temperature,
                budget_tokens=self.config.train.microbatch_tokens,
                token_multiple=self.token_multiple,
                loss=self.config.loss,
                computed=self.stopwatch.stop,
            )


def build_teacher(config: RunConfig, model: TeacherConfig, spec: ModelSpec, groups: ModelGroups) -> Teacher:
    """A frozen model: the run's teacher, or `config.reference`. Collective over the ranks of `groups`."""
    chunks = build_loaded_model(spec, model, groups, build_shard_plan(spec, model.layout), frozen=True)
    host_weights = HostWeights(chunks) if model.offload else None
    return Teacher(config, groups, chunks, spec.vocab_size, token_multiple(model), host_weights)
