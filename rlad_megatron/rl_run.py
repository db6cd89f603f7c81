"""A run of RL in progress: rollouts, rewards and servers around the student and the teacher of `run.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist

from rlad_megatron.config import AHEAD, PHASED
from rlad_megatron.data.quota import GroupQuota, counted_groups, sampling_metrics
from rlad_megatron.data.samples import first_sample, samples_from_rollouts, set_log_probs, trained_rollouts
from rlad_megatron.data.tokenizers import token_texts
from rlad_megatron.data.window import PromptWindow
from rlad_megatron.objectives.aggregate import wave_scale
from rlad_megatron.observe.rollouts import mean_of_updates, reward_metrics, write_rollouts
from rlad_megatron.observe.timeline import REWARDS_ROW, TEACHER_ROW, idle_shares, server_row
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.rewards.pool import RewardPool
from rlad_megatron.run import DistillRun, Wave
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.stream import Round
from rlad_megatron.teacher.client import RemoteTeacher
from rlad_megatron.teacher.teacher import Teacher
from rlad_megatron.types import Group, Prompt, Sample


@dataclass(kw_only=True)
class RlRun(DistillRun):
    """A run with rollouts: also prompts, reward and servers."""

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
        samples = samples_from_rollouts([group.rollouts], config.objective, whole)
        first = first_sample(group.rollouts, samples, config.objective)
        if first is not None:
            # Which of the first groups are the ones that the update takes, and that are kept, is not known yet.
            first.watched = group.index < config.observe.rollouts_per_step + config.rollout.overprovision
        return samples

    def add_reference_log_probs(self, wave: Wave) -> None:
        """Score the samples with the starting student, if the objective has a KL to it."""
        if self.reference is not None and (samples := wave.all_samples):
            with self.timers("reference"):
                set_log_probs(samples, reference=self.reference.log_probs(samples))

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
        dropped = [rollout for group, samples in found if not samples for rollout in group.rollouts]
        self.perf.tokens += sum(len(rollout.prompt.tokens) + len(rollout.tokens) for rollout in dropped)
        if self.is_first_rank:
            with self.timers("write_rollouts"):
                self._write_rollouts(found[: self.config.observe.rollouts_per_step])
        trained = sum(len(samples) for _, samples in found)
        sampling = sampling_metrics(found, needed) if self.config.objective.dynamic_sampling else {}
        return reward_metrics(groups, trained=trained, version=version) | sampling | combined

    def _write_rollouts(self, found: list[tuple[Group, list[Sample]]]) -> None:
        objective = self.config.objective
        groups = [group.rollouts for group, _ in found]
        samples = [first_sample(group.rollouts, samples, objective) for group, samples in found]
        pieces = partial(token_texts, self.tokenizer)
        write_rollouts(self.config.run_dir, self.step, groups, samples, pieces, std=objective.advantage_std)

    def push_weights(self) -> dict[str, float]:
        """Give all servers the current weights; metrics `sync/...`."""
        return self.fleet.push(self.version)

    def step_times(self) -> dict[str, float]:
        """Also the shares of idle time, `idle/...`."""
        times, now = self.timers.pop(), time.time()
        seconds = times["time/step"]
        waiting = times["time/rollout"]
        if isinstance(self.teacher, RemoteTeacher):
            waiting += times.get("time/teacher", 0.0)
        busy = partial(self.timeline.busy, start=now - seconds, end=now)
        times["time/reward"] = busy(REWARDS_ROW)
        servers = [busy(server_row(server.index)) for server in self.fleet.servers]
        teacher = busy(TEACHER_ROW) if self.teacher is not None else None
        teacher_s = teacher if isinstance(self.teacher, RemoteTeacher) else times.get("time/teacher")
        idle = idle_shares(seconds, waiting=waiting, servers=servers, teacher=teacher)
        return times | self.work_done(times, teacher_s) | idle

    def verify_weights(self) -> dict[str, float]:
        """Whether servers decode with the trainer's weights, on a few fixed prompts; WeightSyncError if not."""
        return self.fleet.verify()
