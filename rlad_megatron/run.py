"""A run in progress: what it is made of. `setup.py` builds it, `loop.py` says what is done with it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from rlad_megatron import platform
from rlad_megatron.config import AHEAD, PHASED, RunConfig
from rlad_megatron.config.recipe import to_yaml
from rlad_megatron.data.quota import GroupQuota, counted_groups, sampling_metrics
from rlad_megatron.data.samples import samples_from_rollouts, set_log_probs, trained_rollouts
from rlad_megatron.data.tokenizers import Tokenizer
from rlad_megatron.data.window import PromptWindow
from rlad_megatron.models.safetensors_files import export_hf
from rlad_megatron.objectives.aggregate import wave_scale
from rlad_megatron.observe.checks import NonFiniteGuard
from rlad_megatron.observe.metrics import MetricsWriter, read_metrics
from rlad_megatron.observe.report import write_report
from rlad_megatron.observe.rollouts import mean_of_updates, reward_metrics, step_line, write_rollouts
from rlad_megatron.observe.summary import summary_rows, summary_table
from rlad_megatron.observe.timeline import REWARDS_ROW, TEACHER_ROW, Timeline, idle_shares, server_row
from rlad_megatron.observe.timers import PhaseTimers
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.rewards.pool import RewardPool
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.stream import Round
from rlad_megatron.teacher.client import RemoteTeacher, TeacherAddress
from rlad_megatron.teacher.teacher import Teacher
from rlad_megatron.trainer import checkpoint
from rlad_megatron.trainer.actor import Actor
from rlad_megatron.trainer.run_state import CONFIG, LATEST, find_checkpoint, latest_step, write_latest, write_whole
from rlad_megatron.types import Group, Prompt, Sample


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
                self.console.print(f"{folder / LATEST} names no step: took {source.name}, the newest sound checkpoint")
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
        metrics = {**metrics, "memory/peak_gb": platform.peak_memory_gb()}
        self.metrics.write(self.step, metrics)
        self.timeline.write(self.step)
        self.guard.update(metrics.get("train/skipped", 0) > 0, self.step)
        self.console.print(step_line(self.step, self.config.train.steps, metrics), soft_wrap=True)

    def step_times(self) -> dict[str, float]:
        """Seconds of the step that has just ended and of its phases: `time/...`."""
        return self.timers.pop()

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
class RlRun(TrainerRun):
    """A run with rollouts: also the teacher, prompts, reward and servers."""

    teacher: Teacher | RemoteTeacher | None  # None: the objective needs none
    reference: Teacher | None  # the starting student; None: the objective has no KL to it
    prompts: PromptWindow | None  # on rank 0, which holds them
    eval_prompts: Sequence[Prompt]  # on rank 0; empty on the others
    dropped_prompts: int  # of both splits, too long
    rewards: RewardPool  # open on rank 0
    fleet: ServerFleet
    rounds: dict[int, Round] = field(default_factory=dict)  # begun, by step

    def state(self) -> dict[str, Any]:
        """Rank 0's is kept."""
        prompts = self.prompts.state_dict() if self.prompts else {}
        return super().state() | {
            "verb": "train",
            "prompts": prompts,
            "agreement": self.fleet.agreement.levels,
            "entropy": self.actor.entropy_bonus.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        window = self.prompts
        on_first_rank(lambda: window.load_state_dict(state["prompts"]) if window else None, dist.group.WORLD)
        self.fleet.agreement.levels = state.get("agreement", {})
        self.actor.entropy_bonus.load_state_dict(state.get("entropy", {}))

    def begin_rounds(self) -> None:
        """Have the servers begin this step's round and, with rollout.schedule=ahead, those of the next steps."""
        config, train = self.config.rollout, self.config.train
        ahead = config.ahead if self.config.schedule == AHEAD else 0
        for number in range(self.step, min(self.step + ahead, train.steps) + 1):
            if number not in self.rounds:
                prompts = self.prompts.round(number) if self.prompts else []
                self.rounds[number] = Round(
                    number,
                    prompts,
                    config.group_size,
                    config.sampling,
                    needed=config.prompts_per_step,
                    experts=config.router_replay,
                    replaces=self._replacing(number),
                )
                self.fleet.submit(self.rounds[number])

    def _replacing(self, number: int) -> Callable[[Group], bool]:
        """`Round.replaces` of a round: adds the prompt that dynamic sampling takes in place of a group's."""
        quota, window = GroupQuota(self.config), self.prompts

        def replaces(group: Group) -> bool:
            before = quota.sampled
            quota.take([group])
            if grows := window is not None and quota.sampled > before:
                window.grow(number)
            return grows

        return replaces

    def waves(self) -> Iterator[Wave]:
        """The step's groups as they finish, in waves that fill every rank; in one wave if the schedule is phased."""
        batch, quota, used, last = self.rounds[self.step], GroupQuota(self.config), set[int](), False
        while not last:
            with self.timers("rollout"):
                groups = self.fleet.collect(batch, self._fills_every_rank)
                used |= {group.index for group in groups}
                quota.take(groups)
                if last := quota.is_full:
                    del self.rounds[self.step]
                    if self.prompts:
                        self.prompts.close(self.step, used)
                    self.fleet.sleep()
            yield Wave(groups, [self._samples(group) for group in groups], last)

    def _fills_every_rank(self, groups: list[Group]) -> bool:
        """Whether groups have enough tokens for all data-parallel ranks and pipeline stages."""
        if self.config.schedule == PHASED:
            return False
        sizes = self.actor.groups
        tokens = sum(
            len(rollout.prompt.tokens) + len(rollout.tokens)
            for group in groups
            for rollout in trained_rollouts(group.rollouts, self.config.objective)
        )
        return tokens >= sizes.dp_size * sizes.pp_size * self.config.train.microbatch_tokens

    def _samples(self, group: Group) -> list[Sample]:
        config = self.config
        responses = config.rollout.prompts_per_step * config.rollout.group_size // config.train.updates_per_rollout
        whole = responses, config.rollout.sampling.max_tokens
        return samples_from_rollouts([group.rollouts], config.objective, whole)

    def add_teacher_log_probs(self, wave: Wave) -> None:
        """Score the samples with the teacher, if the objective needs one and none has done so."""
        samples = [sample for sample in wave.all_samples if sample.teacher_log_probs is None]
        if self.teacher is not None and samples:
            start = time.time()
            with self.timers("teacher"):
                set_log_probs(samples, teacher=self.teacher.log_probs(samples))
            if self.is_first_rank:  # for all: a row has one writer
                self.timeline.add(TEACHER_ROW, "log-probs", start, time.time())

    def add_reference_log_probs(self, wave: Wave) -> None:
        """Score the samples with the starting student, if the objective has a KL to it."""
        if self.reference is not None and (samples := wave.all_samples):
            with self.timers("reference"):
                set_log_probs(samples, reference=self.reference.log_probs(samples))

    def train_on(self, wave: Wave) -> None:
        """Add a wave's gradients to the step's update. With several updates, score pi_old for them instead.

        With one update, the loss's own forward pass gives pi_old.
        """
        if self.config.train.updates_per_rollout == 1:
            self.accumulate(wave.all_samples, last=wave.last)
        elif samples := wave.all_samples:
            with self.timers("old_logprobs"):
                set_log_probs(samples, old=self.actor.log_probs(samples))

    def finish_updates(self, waves: list[Wave]) -> dict[str, float]:
        """The step's optimizer updates, after all its waves; metrics of updates and rollouts.

        Several updates take groups in the order of their prompts, so none gets the short responses.
        Raises WeightSyncError if the servers sampled with other log-probs than the student has.
        """
        found = [(group, samples) for wave in waves for group, samples in zip(wave.groups, wave.samples, strict=True)]
        found.sort(key=lambda pair: pair[0].index)
        needed = self.config.rollout.prompts_per_step
        updates, version, counted = self.config.train.updates_per_rollout, self.version, counted_groups(found, needed)
        size, metrics = needed // updates, []
        for part in (counted[start : start + size] for start in range(0, needed, size)):
            if updates > 1:
                self.accumulate([sample for _, samples in part for sample in samples], last=True)
            lengths = [len(rollout.tokens) for group, _ in part for rollout in group.rollouts]
            longest = self.config.rollout.sampling.max_tokens
            metrics.append(self.finish_update(wave_scale(lengths, self.config.objective.aggregation, longest)))
        combined = mean_of_updates(metrics)
        if "mismatch/abs_mean" in combined and not combined["train/skipped"] and self.config.schedule != AHEAD:
            gaps = {"mean": combined["mismatch/abs_mean"], "p99": combined["mismatch/abs_p99"]}
            self.fleet.agreement.check("rollouts", {"the sampler": gaps})
        groups = [group.rollouts for group, _ in found]
        if self.is_first_rank:
            count, std = self.config.observe.rollouts_per_step, self.config.objective.advantage_std
            write_rollouts(self.config.run_dir, self.step, groups, count, std=std)
        trained = sum(len(samples) for _, samples in found)
        sampling = sampling_metrics(found, needed) if self.config.objective.dynamic_sampling else {}
        return reward_metrics(groups, trained=trained, version=version) | sampling | combined

    def push_weights(self) -> dict[str, float]:
        """Give all servers the current weights; metrics `sync/...`."""
        return self.fleet.push(self.version)

    def step_times(self) -> dict[str, float]:
        """Also the shares of idle time, `idle/...`."""
        times, now = super().step_times(), time.time()
        seconds = times["time/step"]
        waiting = times["time/rollout"]
        if isinstance(self.teacher, RemoteTeacher):
            waiting += times.get("time/teacher", 0.0)
        busy = partial(self.timeline.busy, start=now - seconds, end=now)
        times["time/reward"] = busy(REWARDS_ROW)
        servers = [busy(server_row(server.index)) for server in self.fleet.servers]
        teacher = busy(TEACHER_ROW) if self.teacher is not None else None
        return times | idle_shares(seconds, waiting=waiting, servers=servers, teacher=teacher)

    def verify_weights(self) -> dict[str, float]:
        """Whether servers decode with the trainer's weights, on a few fixed prompts; WeightSyncError if not."""
        return self.fleet.verify()
