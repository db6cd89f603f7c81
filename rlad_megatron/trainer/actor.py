"""The student in training: the only stateful object of the trainer.

Shape letters: N loss-carrying positions of a micro-batch, H hidden size, R response tokens of a sample.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from rlad_megatron import platform
from rlad_megatron.config import OBJECTIVES, RunConfig
from rlad_megatron.data.packing import pack
from rlad_megatron.models.build import build_loaded_model, named_parameters
from rlad_megatron.models.forward import run_schedule, score_samples
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.models.head import Head
from rlad_megatron.models.perturb import perturbed
from rlad_megatron.models.precision import fp8_warmup_passes, token_multiple
from rlad_megatron.models.shard_plan import ShardPlan, fingerprint
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.objectives.entropy import EntropyBonus
from rlad_megatron.objectives.registry import averaged_for
from rlad_megatron.objectives.response_mean import response_mean
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.parallel.loss_scaling import (
    earlier_gradients_kept,
    no_tokens,
    reduce_gradients,
    unreduced_gradients,
)
from rlad_megatron.trainer.loss import Report, loss_report, reduce_reports, token_loss
from rlad_megatron.trainer.setup import (
    build_optimizer,
    gradients_are_finite,
    lower_loss_scale,
    training_bytes,
    wrap_for_training,
)
from rlad_megatron.trainer.token_record import TokenRecord
from rlad_megatron.types import Microbatch, Sample, StepResult, TokenBatch


class Actor:
    """Model, optimizer and learning-rate schedule of the student on this rank.

    Every method is collective over all ranks and takes the same samples on every rank.
    """

    def __init__(self, config: RunConfig, spec: ModelSpec, groups: ModelGroups, plan: ShardPlan) -> None:
        self.config = config
        self.groups = groups
        self.spec = spec
        self.token_multiple = token_multiple(config.student)
        router_replay = config.rollout.router_replay
        chunks = build_loaded_model(spec, config.student, groups, plan, train=config.train, router_replay=router_replay)
        self.head = Head(chunks[-1], groups, spec.vocab_size, config.rollout.sampling.temperature, config.loss)
        self.stopwatch = platform.Stopwatch()  # of this rank's own work in updates, without waiting for gradients
        self.chunks = wrap_for_training(chunks, groups, config.optimizer, config.student, reducing=self.stopwatch.stop)
        updates = config.train.steps * config.train.updates_per_rollout
        self.optimizer, self.scheduler = build_optimizer(self.chunks, config.optimizer, config.student, updates)
        self.entropy_bonus = EntropyBonus(config.objective)
        self._start_update()
        self.model_fingerprint = fingerprint(plan.hf_shapes)
        self.entries = plan.entries(groups.place)
        self.float32_tensors = plan.float32
        self.weights = GatheredWeights(
            self.entries,
            self.parameters(),
            plan.hf_shapes,
            dtype=platform.DTYPES[config.student.precision],
            float32=plan.float32,
            group=dist.group.WORLD,
        )

    def parameters(self) -> dict[str, torch.Tensor]:
        """This rank's parameters by their names in the shard plan."""
        return named_parameters(unwrap_model(self.chunks), self.spec)

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's part of the student, its gradients and its optimizer's state."""
        return training_bytes(self.chunks, self.optimizer)

    def perturbed(self, bit: int) -> AbstractContextManager[None]:
        """Changes every weight by a known amount until the context ends (models/perturb.py)."""
        self.wait_for_param_gather()
        return perturbed(self.parameters().values(), bit)

    def wait_for_param_gather(self) -> None:
        """With `optimizer.overlap_param_gather`, wait until this rank's parameters are the updated ones.

        Forward passes wait by themselves. Call this before reading parameters in any other way.
        """
        if self.config.optimizer.overlap_param_gather:
            # DDP's start_param_sync(force_sync=True) would skip the post-processing of gathered FP8 weights.
            for chunk in self.chunks:
                for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def log_probs(self, samples: list[Sample], temperature: float | None = None) -> list[torch.Tensor]:
        """float32 [R] of each sample under the current student, on every rank; by default at the run's temperature."""
        if self._fp8_warmup_passes():
            # Transformer Engine updates scales only with gradients enabled. One forward pass sets those of the forward.
            with torch.enable_grad():
                first = self._pack(samples)[: self.groups.microbatch_multiple]
                run_schedule(self.chunks, self.groups, first, lambda *_: None, forward_only=True)
        return score_samples(
            self.chunks,
            self.groups,
            samples,
            vocab_size=self.spec.vocab_size,
            temperature=temperature or self.config.rollout.sampling.temperature,
            budget_tokens=self.config.train.microbatch_tokens,
            token_multiple=self.token_multiple,
            loss=self.config.loss,
        )

    def update(self, samples: list[Sample]) -> StepResult:
        """One optimizer update on `samples`. Non-finite gradients skip it and leave the parameters unchanged.

        In fp16, gradients that overflow are first recomputed at lower loss scales.
        """
        self.accumulate(samples, last=True)
        return self.finish_update()

    def accumulate(self, samples: list[Sample], *, last: bool) -> None:
        """Add the gradients of some samples, at least one, to the update in progress.

        last: no more will come, so gradients may be reduced over data-parallel ranks during this backward pass
        (`optimizer.overlap_grad_reduce`). If more could have come, `finish_update` reduces them.
        """
        wave = self._pack(samples), last
        if not self._waves:
            for _ in range(self._fp8_warmup_passes()):
                self._zero_gradients()
                self._backward(wave[0][: self.groups.microbatch_multiple], last=True)
            self._zero_gradients()
        self._waves.append(wave)
        self._needed_tokens += sum(sample.tokens.numel() for sample in samples)
        self._record.watch(samples)
        self._reports += self._backward(*wave, recorded=samples)

    def finish_update(self, scale: float = 1.0) -> StepResult:
        """The optimizer step on what was accumulated, as `update`. scale: multiplies the loss and its gradients."""
        waves, needed = self._waves, self._needed_tokens
        metrics, finite = self._result(self._reports, scale, reduced=waves[-1][1])
        while not finite and math.isfinite(metrics["loss/policy"]) and lower_loss_scale(self.optimizer):
            self._zero_gradients()
            reports = [report for wave in waves for report in self._backward(*wave)]
            metrics, finite = self._result(reports, scale, reduced=waves[-1][1])
        self._record.finish(counted=self.groups.reports)
        self._start_update()
        metrics["tokens/padding_share"] = 1 - needed / metrics.pop("positions")
        if self.entropy_bonus.enabled:
            metrics["entropy/bonus_weight"] = self.entropy_bonus.weight
        metrics |= {"grad_norm": math.nan, "lr": self.optimizer.param_groups[0]["lr"]}
        if finite:
            _, grad_norm, _ = self.optimizer.step()
            self.scheduler.step(increment=1)
            metrics["grad_norm"] = float(grad_norm)
            self.entropy_bonus.measured(metrics["entropy/mean"])
        return StepResult(metrics, skipped=not finite)

    @property
    def has_gradients(self) -> bool:
        """Whether an update is in progress."""
        return bool(self._waves)

    def _start_update(self) -> None:
        self._waves: list[tuple[list[Microbatch], bool]] = []
        self._reports: list[Report] = []
        self._record = TokenRecord()
        self._needed_tokens = 0

    def _pack(self, samples: list[Sample]) -> list[Microbatch]:
        return pack(
            samples,
            budget_tokens=self.config.train.microbatch_tokens,
            multiple=self.token_multiple,
            count_multiple=self.groups.microbatch_multiple,
            dp_rank=self.groups.dp_rank,
            dp_size=self.groups.dp_size,
            cp_rank=self.groups.cp_rank,
            cp_size=self.groups.cp_size,
        )

    def _fp8_warmup_passes(self) -> int:
        """0 once this run, or the run it resumes, has made an update."""
        return 0 if self.scheduler.num_steps else fp8_warmup_passes(self.config.student)

    def _zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._buffers_are_clear = True

    def _backward(
        self, microbatches: list[Microbatch], last: bool, recorded: list[Sample] | None = None
    ) -> list[Report]:
        """Add the gradients of micro-batches to the buffers; the last ones reduce them over data-parallel ranks.

        recorded: the samples that were packed, if their tokens are to be recorded.
        """
        gradient_scale = self.optimizer.get_loss_scale().item()

        def on_hidden(hidden_NH: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, Report]:
            """Megatron's (loss, number of tokens, report) of one micro-batch."""
            per_token = self._with_response_mean(hidden_NH, microbatch)
            of_token = token_loss(per_token, self.config.objective, self.entropy_bonus.weight)
            loss, stats = self.head.loss(hidden_NH, microbatch.targets, of_token, gradient_scale=gradient_scale)
            report = loss_report(loss, stats, per_token, self.config.objective)
            if recorded is not None:
                self._record.add(recorded, microbatch, stats)
            report["sum/positions"] = loss.new_full((), microbatch.tokens.numel())
            return loss, no_tokens(loss.device), report

        kept = nullcontext() if self._buffers_are_clear else earlier_gradients_kept(self.chunks)
        self._buffers_are_clear = False
        self.stopwatch.start()
        with kept, nullcontext() if last else unreduced_gradients(self.chunks):
            reports = run_schedule(self.chunks, self.groups, microbatches, on_hidden, forward_only=False)
        self.stopwatch.stop()
        return reports

    def _with_response_mean(self, hidden_NH: torch.Tensor, microbatch: Microbatch) -> TokenBatch:
        """What the loss needs, with the mean over each response if the objective asks for one.

        A mean over tokens of all chunks may take a pass over the head before the loss's own.
        """
        batch, objective = microbatch.per_token, self.config.objective
        if objective.ratio == "sequence":
            if batch.old_log_probs is None:  # pi_old is the student of this pass, and every ratio is 1
                return batch
            value_N = self.head.log_probs(hidden_NH, microbatch.targets) - batch.old_log_probs
        elif OBJECTIVES[objective.name].averages_over_responses:
            with_old = batch
            if batch.old_log_probs is None:
                with_old = batch.with_old(self.head.log_probs(hidden_NH, microbatch.targets))
            value_N = averaged_for(objective.name)(with_old, objective)
        else:
            return batch
        return replace(batch, response_mean=self._response_mean(value_N, microbatch))

    def _response_mean(self, value_N: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        """float32 [N], over the response to which each position belongs. Collective over context-parallel ranks."""
        lengths_S = microbatch.response_lengths
        response_N = torch.bucketize(microbatch.loss_indices, lengths_S.cumsum(0), right=True)
        context = self.groups.collection.cp

        def sum_over_ranks(sums_S: torch.Tensor) -> None:
            if self.groups.cp_size > 1:  # each rank holds some tokens of every response
                dist.all_reduce(sums_S, group=context)

        device = value_N.device
        return response_mean(value_N, response_N.to(device), lengths_S.to(device), sum_over_ranks)

    def _result(self, reports: list[Report], scale: float, *, reduced: bool) -> tuple[dict[str, float], bool]:
        """Metrics of the gradients in the buffers, and whether loss and gradients are finite."""
        if not reduced:
            reduce_gradients(self.chunks)
        if scale != 1.0:
            for chunk in self.chunks:
                chunk.scale_gradients(scale)
        metrics = reduce_reports(reports, counted=self.groups.reports)
        metrics["loss/policy"] *= scale
        return metrics, math.isfinite(metrics["loss/policy"]) and gradients_are_finite(self.chunks)
