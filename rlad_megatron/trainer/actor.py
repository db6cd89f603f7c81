"""The student in training: the only stateful object of the trainer.

Shape letters: N loss-carrying positions of a micro-batch, C of them, H hidden size, R response tokens of a sample.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.data.packing import pack
from rlad_megatron.models.build import build_loaded_model, named_parameters
from rlad_megatron.models.forward import run_schedule, score_samples
from rlad_megatron.models.head import Head
from rlad_megatron.models.precision import fp8_warmup_passes, token_multiple
from rlad_megatron.models.shard_plan import ShardPlan, fingerprint
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.objectives.mismatch import mismatch_stats, mismatch_weights
from rlad_megatron.objectives.registry import objective_for
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.parallel.loss_scaling import no_tokens
from rlad_megatron.trainer.setup import (
    build_optimizer,
    gradients_are_finite,
    loss_scale,
    lower_loss_scale,
    wrap_for_training,
)
from rlad_megatron.types import Microbatch, Sample, StepResult

# Per-token statistics of the objectives and the metric that their mean becomes.
STAT_METRICS = {
    "clipped": "ratio/clip_fraction",
    "ratio": "ratio/mean",
    "teacher_gap": "trrd/teacher_gap_mean",
    "clamped": "trrd/clamp_fraction",
}


class Actor:
    """Model, optimizer and schedule of the student on this rank.

    Every method is collective over all ranks, and takes the same samples on every rank.
    """

    def __init__(self, config: RunConfig, spec: ModelSpec, groups: ModelGroups, plan: ShardPlan) -> None:
        self.config = config
        self.groups = groups
        self.vocab_size = spec.vocab_size
        self.objective = objective_for(config.objective.name)
        self.token_multiple = token_multiple(config.student)
        gpt = build_loaded_model(spec, config.student, groups, plan, recompute=config.train.recompute)
        self.model = wrap_for_training(gpt, groups, config.optimizer, config.student)
        updates = config.train.steps * config.train.updates_per_rollout
        self.optimizer, self.scheduler = build_optimizer(self.model, config.optimizer, config.student, updates)
        self.spec = spec
        self.plan = plan
        self.model_fingerprint = fingerprint(plan.hf_shapes)
        self.entries = plan.entries(tp_rank=groups.tp_rank, pp_rank=groups.pp_rank)

    def parameters(self) -> dict[str, torch.Tensor]:
        """This rank's parameters by their names in the shard plan."""
        return named_parameters(unwrap_model(self.model), self.spec)

    def wait_for_param_gather(self) -> None:
        """After updates with `optimizer.overlap_param_gather`: wait until this rank's parameters are the new ones.

        Forward passes wait by themselves; whoever reads parameters otherwise needs this before.
        """
        if self.config.optimizer.overlap_param_gather:
            # Not DDP's start_param_sync(force_sync=True), which leaves out what FP8 weights need after a gather.
            for group in (*self.model.bucket_groups, *self.model.expert_parallel_bucket_groups):
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    def log_probs(self, samples: list[Sample], temperature: float | None = None) -> list[torch.Tensor]:
        """float32 [R] of each sample under the current student, on every rank; by default at the run's temperature."""
        if self._fp8_warmup_passes():
            # Transformer Engine renews scales where gradients are enabled; those of a forward pass are known after one.
            with torch.enable_grad():
                run_schedule(self.model, self.groups, self._pack(samples)[:1], lambda *_: None, forward_only=True)
        return score_samples(
            self.model,
            self.groups,
            samples,
            vocab_size=self.vocab_size,
            temperature=temperature or self.config.rollout.sampling.temperature,
            budget_tokens=self.config.train.microbatch_tokens,
            token_multiple=self.token_multiple,
            loss=self.config.loss,
        )

    def update(self, samples: list[Sample]) -> StepResult:
        """One optimizer update on `samples`, whose weights sum to about 1. Non-finite gradients change nothing.

        In fp16 gradients that overflow are first made again at lower loss scales.
        """
        microbatches = self._pack(samples)
        for _ in range(self._fp8_warmup_passes()):
            self._gradients(microbatches[:1])
        metrics, finite = self._gradients(microbatches)
        while not finite and math.isfinite(metrics["loss/policy"]) and lower_loss_scale(self.optimizer):
            metrics, finite = self._gradients(microbatches)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if not finite:
            return StepResult({**metrics, "grad_norm": math.nan, "lr": learning_rate}, skipped=True)
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return StepResult({**metrics, "grad_norm": float(grad_norm), "lr": learning_rate})

    def _pack(self, samples: list[Sample]) -> list[Microbatch]:
        return pack(
            samples,
            budget_tokens=self.config.train.microbatch_tokens,
            multiple=self.token_multiple,
            dp_rank=self.groups.dp_rank,
            dp_size=self.groups.dp_size,
        )

    def _fp8_warmup_passes(self) -> int:
        """How many are still to be made: all of them until an update has been made, also by the run that is resumed."""
        return 0 if self.scheduler.num_steps else fp8_warmup_passes(self.config.student)

    def _gradients(self, microbatches: list[Microbatch]) -> tuple[dict[str, float], bool]:
        """Make the gradients of an update; returns its metrics, and whether loss and gradients are finite."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        on_hidden = partial(self._loss, gradient_scale=loss_scale(self.optimizer))
        reports = run_schedule(self.model, self.groups, microbatches, on_hidden, forward_only=False)
        metrics = self._reduce(reports)
        return metrics, math.isfinite(metrics["loss/policy"]) and gradients_are_finite(self.model)

    def _loss(self, hidden_NH: torch.Tensor, microbatch: Microbatch, *, gradient_scale: float):
        """Megatron's (loss, number of tokens, report) of one micro-batch."""
        config, per_token = self.config.objective, microbatch.per_token

        def token_loss(log_probs_C: torch.Tensor, tokens: slice):
            batch = {name: value[tokens] for name, value in per_token.items()}
            surrogate_C, stats = self.objective(log_probs_C, batch, config)
            weight_C = batch["weight"]
            if "sampler_log_probs" in batch:
                old_C = batch.get("old_log_probs", log_probs_C.detach())
                weight_C = weight_C * mismatch_weights(
                    old_C,
                    batch["sampler_log_probs"],
                    correction=config.mismatch_correction,
                    cap=config.mismatch_cap,
                )
            return -weight_C * surrogate_C, stats

        head = Head(
            unwrap_model(self.model),
            self.groups,
            self.vocab_size,
            self.config.rollout.sampling.temperature,
            self.config.loss,
        )
        loss, stats = head.loss(
            hidden_NH,
            microbatch.targets,
            token_loss,
            gradient_scale=gradient_scale,
        )
        log_probs_N = stats.pop("log_probs")
        report = {"sum/tokens": no_tokens(loss.device).float() + log_probs_N.numel(), "sum/loss": loss.detach().clone()}
        if "sampler_log_probs" in per_token:
            gap = mismatch_stats(per_token.get("old_log_probs", log_probs_N), per_token["sampler_log_probs"])
            report |= {"sum/mismatch": gap["abs_sum"], "max/mismatch": gap["abs_max"]}
        report |= {f"sum/{STAT_METRICS[name]}": value.float().sum() for name, value in stats.items()}
        return loss, no_tokens(loss.device), report

    def _reduce(self, reports: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Global means over all tokens of the update, the same on every rank."""
        # Ranks without a report (earlier stages) must know its keys to join the reduction.
        keys: list = [sorted(reports[0]) if reports else None]
        dist.broadcast_object_list(keys, src=dist.get_world_size() - 1)
        values = torch.zeros(len(keys[0]), dtype=torch.float64, device=platform.device())
        is_max = torch.tensor([key.startswith("max/") for key in keys[0]], device=values.device)
        if self.groups.reports:
            table = torch.stack([torch.stack([report[key].double() for key in keys[0]]) for report in reports])
            values = torch.where(is_max, table.amax(0), table.sum(0))
        maxima = values.clone()
        dist.all_reduce(values)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        total = dict(zip(keys[0], torch.where(is_max, maxima, values).tolist(), strict=True))

        tokens = total.pop("sum/tokens")
        metrics = {"loss/policy": total.pop("sum/loss"), "tokens/train": tokens}
        if "sum/mismatch" in total:
            metrics["mismatch/abs_mean"] = total.pop("sum/mismatch") / max(tokens, 1)
            metrics["mismatch/abs_max"] = total.pop("max/mismatch")
        return metrics | {key.removeprefix("sum/"): value / max(tokens, 1) for key, value in total.items()}
