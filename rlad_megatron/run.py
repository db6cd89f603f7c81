"""A run in progress: what it is made of. `setup.py` builds it, `loop.py` says what is done with it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.recipe import to_yaml
from rlad_megatron.data.samples import set_log_probs
from rlad_megatron.data.tokenizers import Tokenizer
from rlad_megatron.models.safetensors_files import export_hf
from rlad_megatron.observe.checks import NonFiniteGuard
from rlad_megatron.observe.metrics import MetricsWriter, read_metrics
from rlad_megatron.observe.profile import profiled
from rlad_megatron.observe.report import write_report
from rlad_megatron.observe.rollouts import drop_rollouts_after, step_line
from rlad_megatron.observe.summary import summary_rows, summary_table
from rlad_megatron.observe.timeline import TEACHER_ROW, Timeline
from rlad_megatron.observe.timers import PhaseTimers
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.perf import Performance, memory_metrics, slowest_ranks
from rlad_megatron.teacher.client import RemoteTeacher, TeacherAddress
from rlad_megatron.teacher.teacher import Teacher
from rlad_megatron.trainer import checkpoint
from rlad_megatron.trainer.actor import Actor
from rlad_megatron.trainer.run_state import CONFIG, LATEST, find_checkpoint, latest_step, write_latest, write_whole
from rlad_megatron.types import Group, Sample


@dataclass(frozen=True)
class LauncherHooks:
    """What a launcher supplies. The defaults are those of one machine."""

    # Waits for a teacher on dedicated ranks; returns where it answers. Called on rank 0.
    find_teacher: Callable[[], TeacherAddress]
    # Told the tokens of the longest prompt and response together, before servers are needed. Called on every rank.
    prompts_read: Callable[[int], None] = lambda max_model_len: None
    # Waits for the servers that the launcher started; returns their URLs by index. Called on rank 0.
    find_servers: Callable[[], list[str]] | None = None
    # With the secret of those servers.
    token_file: Path | None = None
    # Whether this rank was told that its time is nearly over.
    stop_requested: Callable[[], bool] = lambda: False
    # Whether it is over, so that the step at hand is dropped. Called on rank 0.
    drop_requested: Callable[[], bool] = lambda: False


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
    timeline: Timeline
    perf: Performance
    console: Console = field(default_factory=lambda: Console(quiet=dist.get_rank() > 0, highlight=False))
    step: int = 0  # steps completed, or the one in progress
    saved_step: int = 0  # of the newest checkpoint; 0: none
    version: int = 0  # of the weights; 0 is the student's folder
    id: str = field(default_factory=lambda: secrets.token_hex(8))  # rank 0's marks the checkpoints; a resume keeps it

    def __post_init__(self) -> None:
        self._whole: dict[str, Any] = {}  # the state after the last whole step
        self.guard = NonFiniteGuard(self.config.train.max_skipped_steps)
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
            if self.config.resume:
                drop_rollouts_after(self.config.run_dir, self.step)
            self.timeline.truncate_after(self.step or -1)  # without a checkpoint, step 0 is repeated too
            write_whole(self.config.run_dir / CONFIG, to_yaml(replace(self.config, resume=False, resume_step=0)))

    def _resume(self) -> None:
        folder, step = self.config.run_dir / "checkpoints", self.config.resume_step
        source = on_first_rank(lambda: find_checkpoint(folder, step), dist.group.WORLD)
        if source is None:
            self.metrics.truncate_after(-1)
            self.console.print("no checkpoint yet: starting from the beginning")
            return
        meta = checkpoint.load(source, self.actor)
        self.load_state(meta["loop"])
        self.id = meta.get("run", self.id)
        self.metrics.truncate_after(self.step)
        if self.is_first_rank and latest_step(folder) != self.step:
            if not step:
                said = f"{folder / LATEST} names no step: took {source.name}, the newest sound checkpoint"
                self.console.print(said, soft_wrap=True)
            write_latest(folder, self.step)  # a later resume continues from here
        self.console.print(f"resumed after step {self.step}")

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds next to the actor."""
        return {"verb": "sft", "step": self.step, "version": self.version}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = self.saved_step = state["step"]
        self.version = state["version"]

    def accumulate(self, samples: list[Sample], *, last: bool) -> None:
        """Add the gradients of samples, perhaps none, to the update in progress. last: no more will come."""
        with self.timers("update"):
            if samples:
                self.perf.trained(samples)
                self.actor.accumulate(samples, last=last)

    def finish_update(self, scale: float = 1.0) -> dict[str, float]:
        """The optimizer update. One without samples, or with a non-finite gradient, changes nothing.

        scale: multiplies the loss and its gradients (objectives/aggregate.py:wave_scale).
        """
        with self.timers("update"):
            if not self.actor.has_gradients:  # all groups were dropped
                return {"tokens/train": 0.0, "train/skipped": 0}
            result = self.actor.finish_update(scale)
            self.version += not result.skipped
            self.actor.wait_for_param_gather()
            return {**result.metrics, "train/skipped": int(result.skipped)}

    def log(self, metrics: dict[str, float]) -> None:
        metrics = metrics | memory_metrics(self.memory())
        self.metrics.write(self.step, metrics)
        self.timeline.write(self.step)
        self.guard.update(metrics.get("train/skipped", 0) > 0, self.step)
        self.console.print(step_line(self.step, self.config.train.steps, metrics), soft_wrap=True)

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """Around a step: its time, and its profile if `profile.steps` asks for one."""
        config, rank, cuda = self.config, dist.get_rank(), platform.has_cuda()
        profile = profiled(config.profile, config.run_dir, self.step, rank, cuda, partial(print, flush=True))
        with profile, self.timers("step"):
            yield

    def memory(self) -> dict[str, int]:
        """Bytes of what this rank holds between steps, by part."""
        return self.actor.memory()

    def step_times(self) -> dict[str, float]:
        """Of the step that has just ended: its seconds and those of its phases, and what was done in them (perf.py)."""
        times = self.timers.pop()
        return times | self.work_done(times, times.get("time/teacher"))

    def work_done(self, times: dict[str, float], teacher_s: float | None) -> dict[str, float]:
        """Metrics of what was done in the times of a step. teacher_s: seconds in which the teacher computed."""
        return self.perf.pop(times, teacher_s) | slowest_ranks(self.own_seconds())

    def own_seconds(self) -> dict[str, float]:
        """Seconds that this rank itself computed in phases of the step."""
        return {"update": self.actor.stopwatch.pop()}

    def saved_to_stop(self) -> bool:
        """Whether any rank was told to stop; then a checkpoint has been written. The same on every rank.

        Called between steps.
        """
        self._whole = self.state()
        asked = torch.tensor(float(self.hooks.stop_requested()))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked:
            self.save_checkpoint()
        return bool(asked)

    def drop_step(self) -> None:
        """Save the step before this one, whose update has not begun."""
        self.step -= 1
        self.console.print(f"step {self.step + 1} did not end in time and is dropped")
        self.save_checkpoint(self._whole)

    def save_checkpoint(self, state: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of this step, unless there is one. state: if it is not that of now."""
        if self.step == self.saved_step:
            return
        folder, keep = self.config.run_dir / "checkpoints", self.config.checkpoint.keep
        checkpoint.save(folder, self.step, self.actor, state or self.state(), run=self.id, keep=keep)
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
                float32=self.actor.float32_tensors,
                write=self.is_first_rank,
            )
        if self.is_first_rank:
            self.timeline.merge()
            rows = summary_rows(read_metrics(config.run_dir))
            report = write_report(replace(config, resume=False))
            summary_table(config.name, rows, self.console)
            self.console.print(f"report: {report}", soft_wrap=True)
            if config.checkpoint.export_hf:
                self.console.print(f"student: {config.run_dir / 'hf'}", soft_wrap=True)


@dataclass(frozen=True)
class Wave:
    """Groups that are trained on together."""

    groups: list[Group]
    samples: list[list[Sample]]  # of each group
    last: bool  # of the step

    @property
    def all_samples(self) -> list[Sample]:
        return [sample for samples in self.samples for sample in samples]


@dataclass(kw_only=True)
class DistillRun(TrainerRun):
    """The student in training and its teacher, wherever the samples come from."""

    teacher: Teacher | RemoteTeacher | None  # None: the objective uses none

    def add_teacher_log_probs(self, wave: Wave) -> None:
        """Score the samples with the teacher, if the objective needs one and none has done so."""
        samples = [sample for sample in wave.all_samples if sample.teacher_log_probs is None]
        if self.teacher is not None and samples:
            start = time.time()
            with self.timers("teacher"):
                set_log_probs(samples, teacher=self.teacher.log_probs(samples))
            if self.is_first_rank:  # for all: a row has one writer
                self.timeline.add(TEACHER_ROW, "log-probs", start, time.time())
        if self.teacher is not None:
            self.perf.scored(wave.all_samples)

    def train_on(self, wave: Wave) -> None:
        """Add a wave's gradients to the step's update. With several updates, score pi_old for them instead.

        With one update, the loss's own forward pass gives pi_old.
        """
        if self.config.train.updates_per_rollout == 1:
            self.accumulate(wave.all_samples, last=wave.last)
        elif samples := wave.all_samples:
            with self.timers("old_logprobs"):
                set_log_probs(samples, old=self.actor.log_probs(samples))

    def own_seconds(self) -> dict[str, float]:
        teacher = {"teacher": self.teacher.stopwatch.pop()} if isinstance(self.teacher, Teacher) else {}
        return super().own_seconds() | teacher

    def memory(self) -> dict[str, int]:
        return super().memory() | (self.teacher.memory() if isinstance(self.teacher, Teacher) else {})
