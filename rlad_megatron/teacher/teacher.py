"""The frozen teacher: a Megatron model with its own layout that only scores given tokens.

It runs on the trainer's ranks, or on dedicated ranks (`service.py`, `client.py`).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from rlad_megatron.config import LossConfig, RunConfig, TeacherConfig
from rlad_megatron.models.build import build_loaded_model
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.models.forward import score_samples
from rlad_megatron.models.precision import token_multiple
from rlad_megatron.models.shard_plan import build_shard_plan
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.teacher.offload import HostWeights
from rlad_megatron.types import Sample


class Teacher:
    """Scores the student's tokens. `log_probs` is collective over all ranks."""

    def __init__(
        self,
        spec: ModelSpec,
        model: TeacherConfig,
        groups: ModelGroups,
        *,
        temperature: float,
        budget_tokens: int,
        loss: LossConfig,
    ) -> None:
        self.groups = groups
        # Normalise over the teacher's own vocabulary, as transformers does: models of a family differ in unused rows.
        self.vocab_size = spec.vocab_size
        self.temperature, self.budget_tokens, self.loss = temperature, budget_tokens, loss
        self.token_multiple = token_multiple(model)
        plan = build_shard_plan(spec, model.layout)
        self.model = build_loaded_model(spec, model, groups, plan, frozen=True).eval()
        self.host_weights = HostWeights(self.model) if model.offload else None

    def log_probs(self, samples: list[Sample]) -> list[torch.Tensor]:
        """Teacher log-probs of each sample's response, float32 [R] in nats, on every rank."""
        with self.host_weights.on_device() if self.host_weights else nullcontext():
            return score_samples(
                self.model,
                self.groups,
                samples,
                vocab_size=self.vocab_size,
                temperature=self.temperature,
                budget_tokens=self.budget_tokens,
                token_multiple=self.token_multiple,
                loss=self.loss,
            )


def build_teacher(config: RunConfig, model: TeacherConfig, groups: ModelGroups) -> Teacher:
    """The run's teacher, with the layout and precision of `model`. Collective over the ranks of `groups`."""
    return Teacher(
        read_model_spec(model.path),
        model,
        groups,
        temperature=config.rollout.sampling.temperature,
        budget_tokens=config.train.microbatch_tokens,
        loss=config.loss,
    )
