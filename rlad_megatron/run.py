"""A run in progress: what it is made of. `setup.py` builds it, `loop.py` says what is done with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.recipe import to_yaml
from rlad_megatron.data.prompts import PromptSource
from rlad_megatron.data.samples import set_log_probs
from rlad_megatron.data.tokenizers import Tokenizer
from rlad_megatron.models.safetensors_files import export_hf
from rlad_megatron.observe.checks import NonFiniteGuard
from rlad_megatron.observe.metrics import MetricsWriter, read_metrics
from rlad_megatron.observe.report import write_report
from rlad_megatron.observe.rollouts import mean_of_updates, step_line, write_rollouts
from rlad_megatron.observe.summary import summary_rows, summary_table
from rlad_megatron.observe.timeline import Timeline
from rlad_megatron.observe.timers import PhaseTimers
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.rewards.pool import RewardPool, apply_scores, score_responses
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.teacher.client import RemoteTeacher, TeacherAddress
from rlad_megatron.teacher.teacher import Teacher
from rlad_megatron.trainer import checkpoint
from rlad_megatron.trainer.actor import Actor
from rlad_megatron.trainer.run_state import CONFIG, latest_step
from rlad_megatron.types import Prompt, Rollout, Sample


@dataclass(frozen=True)
class LauncherHooks:
    """What a launcher supplies. The defaults are those of one machine."""

    # Waits for a teacher on dedicated ranks; returns where it answers. Called on rank 0.
    find_teacher: Callable[[], TeacherAddress]
    # Waits for the servers that the launcher started; returns their URLs by index. Called on rank 0.
    find_servers: Callable[[], list[str]] | None = None
    # Whether this rank was told that its time is nearly over.
    stop_requested: Callable[[], bool] = lambda: False


class NoMetrics:
    """Takes the place of a `MetricsWriter` on ranks that write nothing."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def truncate_after(self, step: int) -> None:
        pass


@dataclass(kw_only=True)
class TrainerRun:
    """This rank's part of a run: the student in training. Methods are collective over all ranks."""

    config: RunConfig
    hooks: LauncherHooks
    actor: Actor
    tokenizer: Tokenizer
    metrics: MetricsWriter | NoMetrics
    console: Console = field(default_factory=lambda: Console(quiet=dist.get_rank() > 0, highlight=False))
    step: int = 0  # steps completed, or the one in progress
    saved_step: int = 0  # of the newest checkpoint; 0: none
    version: int = 0  # of the weights; 0 is the student's folder

    def __post_init__(self) -> None:
        self.guard = NonFiniteGuard(self.config.train.max_skipped_steps)
        self.timeline = Timeline(self.config.run_dir)
        self.timers = PhaseTimers(platform.synchronize, self.timeline, f"trainer rank {dist.get_rank()}")

    @property
    def is_first_rank(self) -> bool:
        return dist.get_rank() == 0

    def begin(self) -> None:
        """Load the newest checkpoint, if `resume` is set and there is one; then save the configuration.

        In this order, so that a resume that is refused leaves the run's configuration as it was.
        """
        if self.config.resume:
            self._resume()
        if self.is_first_rank:
            self.timeline.truncate_after(self.step or -1)  # without a checkpoint, step 0 is repeated too
            (self.config.run_dir / CONFIG).write_text(to_yaml(replace(self.config, resume=False)))

    def _resume(self) -> None:
        folder = self.config.run_dir / "checkpoints"
        if latest_step(folder) is None:
            self.metrics.truncate_after(-1)
            self.console.print("no checkpoint yet: starting from the beginning")
            return
        self.load_state(checkpoint.load(folder, self.actor))
        self.metrics.truncate_after(self.step)
        self.console.print(f"resumed after step {self.step}")

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds next to the actor."""
        return {"verb": "sft", "step": self.step, "version": self.version}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = self.saved_step = state["step"]
        self.version = state["version"]

    def update(self, updates: list[list[Sample]]) -> dict[str, float]:
        """The optimizer updates of a step. One without samples, or with a non-finite gradient, changes nothing."""
        metrics = []
        for samples in updates:
            if not samples:  # all groups were dropped
                metrics.append({"tokens/train": 0.0, "train/skipped": 0})
                continue
            result = self.actor.update(samples)
            self.version += not result.skipped
            metrics.append({**result.metrics, "train/skipped": int(result.skipped)})
        self.actor.wait_for_param_gather()
        return mean_of_updates(metrics)

    def log(self, metrics: dict[str, float]) -> None:
        metrics = {**metrics, "memory/peak_gb": platform.peak_memory_gb()}
        self.metrics.write(self.step, metrics)
        self.timeline.write(self.step)
        self.guard.update(metrics.get("train/skipped", 0) > 0, self.step)
        self.console.print(step_line(self.step, self.config.train.steps, metrics), soft_wrap=True)

    def saved_to_stop(self) -> bool:
        """Whether any rank was told to stop; then a checkpoint has been written. The same on every rank."""
        asked = torch.tensor(float(self.hooks.stop_requested()))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked:
            self.save_checkpoint()
        return bool(asked)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.step == self.saved_step:
            return
        folder, keep = self.config.run_dir / "checkpoints", self.config.checkpoint.keep
        checkpoint.save(folder, self.step, self.actor, self.state(), keep=keep)
        self.saved_step = self.step
        if self.is_first_rank:  # all ranks have written their rows: saving is collective
            self.timeline.merge()

    def finish(self) -> None:
        """Export the student, write the report and print the summary."""
        config, weights = self.config, self.actor.weights
        if config.checkpoint.export_hf:
            export_hf(
                weights,
                {tensor.name: tensor.shape for tensor in weights.metadata()},
                like=config.student.path,
                target=config.run_dir / "hf",
                dtype=platform.DTYPES[config.checkpoint.export_precision],
                write=self.is_first_rank,
            )
        if self.is_first_rank:
            self.timeline.merge()
            rows = summary_rows(read_metrics(config.run_dir))
            report = write_report(replace(config, resume=False), rows)
            summary_table(config.name, rows, self.console)
            self.console.print(f"report: {report}", soft_wrap=True)
            if config.checkpoint.export_hf:
                self.console.print(f"student: {config.run_dir / 'hf'}")


@dataclass(kw_only=True)
class RlRun(TrainerRun):
    """A run with rollouts: also the teacher, prompts, reward and servers."""

    teacher: Teacher | RemoteTeacher | None  # None: the objective needs none
    prompts: PromptSource
    eval_prompts: list[Prompt]
    dropped_prompts: int  # of both splits, too long
    rewards: RewardPool  # open on rank 0
    fleet: ServerFleet

    def state(self) -> dict[str, Any]:
        state = {"verb": "train", "prompts": self.prompts.state_dict(), "agreement": self.fleet.agreement.levels}
        return super().state() | state

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.prompts.load_state_dict(state["prompts"])
        self.fleet.agreement.levels = state.get("agreement", {})

    def add_rewards(self, groups: list[list[Rollout]]) -> None:
        """Decode and score the responses in place; computed once, on rank 0."""
        rollouts = [rollout for group in groups for rollout in group]
        scores = on_first_rank(lambda: score_responses(rollouts, self.tokenizer, self.rewards), dist.group.WORLD)
        apply_scores(rollouts, scores)

    def write_rollouts(self, groups: list[list[Rollout]]) -> None:
        """Keep a few of the step's rollouts for people to read."""
        if self.is_first_rank:
            write_rollouts(self.config.run_dir, self.step, groups, self.config.observe.rollouts_per_step)

    def add_teacher_log_probs(self, samples: list[Sample]) -> None:
        """Score the samples with the teacher, if the objective needs one."""
        if self.teacher is not None and samples:
            with self.timers("teacher"):
                set_log_probs(samples, teacher=self.teacher.log_probs(samples))

    def add_old_log_probs(self, samples: list[Sample]) -> None:
        """Score the samples with the student before its updates.

        With one update, the loss's own forward pass gives pi_old.
        """
        if self.config.train.updates_per_rollout > 1 and samples:
            with self.timers("old_logprobs"):
                set_log_probs(samples, old=self.actor.log_probs(samples))

    def push_weights(self) -> None:
        """Give all servers the current weights."""
        self.fleet.push(self.version)

    def update(self, updates: list[list[Sample]]) -> dict[str, float]:
        """As for every run. Raises WeightSyncError if the servers sampled with other log-probs than the student has."""
        metrics = super().update(updates)
        if "mismatch/abs_mean" in metrics and not metrics["train/skipped"]:
            gaps = {"mean": metrics["mismatch/abs_mean"], "p99": metrics["mismatch/abs_p99"]}
            self.fleet.agreement.check("rollouts", {"the sampler": gaps})
        return metrics

    def verify_weights(self) -> dict[str, float]:
        """Whether servers decode with the trainer's weights, on a few fixed prompts; WeightSyncError if not."""
        return self.fleet.verify()
