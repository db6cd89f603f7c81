"""A run in progress: what it is made of. `opening.py` opens it, `loop.py` says what is done with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from rich.console import Console

from rlad_megatron import platform
from rlad_megatron.config import RunConfig, SamplingConfig
from rlad_megatron.config.recipe import to_yaml
from rlad_megatron.data.prompts import PromptSource
from rlad_megatron.data.tokenizers import Tokenizer
from rlad_megatron.evaluate import EVALUATION, batch_seed
from rlad_megatron.models.export import export_hf
from rlad_megatron.models.gathered import MegatronWeightSource
from rlad_megatron.observe.checks import NonFiniteGuard
from rlad_megatron.observe.metrics import MetricsWriter, read_metrics
from rlad_megatron.observe.report import write_report
from rlad_megatron.observe.rollouts import mean_of_updates, step_line, write_rollouts
from rlad_megatron.observe.summary import summary_rows, summary_table
from rlad_megatron.observe.timers import PhaseTimers
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.rewards.registry import Reward
from rlad_megatron.rewards.scoring import apply_scores, score_responses
from rlad_megatron.servers.fleet import ServerFleet, generate_groups
from rlad_megatron.servers.lengths import PROBE_TOKENS
from rlad_megatron.servers.transfer.proof import decode_probe, verify_probe
from rlad_megatron.servers.transfer.sync import WeightSync, release_cached_memory
from rlad_megatron.teacher.client import RemoteTeacher, TeacherAddress
from rlad_megatron.teacher.teacher import Teacher
from rlad_megatron.trainer import checkpoint
from rlad_megatron.trainer.actor import Actor
from rlad_megatron.trainer.run_state import CONFIG, latest_step
from rlad_megatron.types import Prompt, Rollout, Sample


@dataclass(frozen=True)
class LauncherHooks:
    """What a launcher on a cluster supplies. The defaults are those of one machine: the run does it all itself."""

    # URLs of the servers that the launcher started, by index; waits for them. Called on rank 0.
    find_servers: Callable[[], list[str]] | None = None
    # Where a teacher on ranks of its own answers; waits for it. Called on rank 0, of a run that has one.
    find_teacher: Callable[[], TeacherAddress] | None = None
    # Whether this rank was told that its time is nearly over.
    stop_requested: Callable[[], bool] = lambda: False


@dataclass
class Session:
    """This rank's part of a run. What only rank 0 has is None elsewhere. Methods are collective over all ranks."""

    config: RunConfig
    actor: Actor
    source: MegatronWeightSource
    tokenizer: Tokenizer
    console: Console  # quiet but on rank 0
    timers: PhaseTimers
    guard: NonFiniteGuard
    hooks: LauncherHooks
    metrics: MetricsWriter | None = None  # rank 0
    teacher: Teacher | RemoteTeacher | None = None
    prompts: PromptSource | None = None
    eval_prompts: list[Prompt] = field(default_factory=list)
    reward: Reward | None = None
    fleet: ServerFleet | None = None  # rank 0
    sync: WeightSync | None = None
    step: int = 0  # steps completed, or the one in progress
    saved_step: int = 0  # of the newest checkpoint; 0: there is none
    version: int = 0  # of the weights; 0 is the student's folder itself

    @property
    def is_first_rank(self) -> bool:
        return dist.get_rank() == 0

    def generate(
        self, prompts: list[Prompt], group_size: int, sampling: SamplingConfig, *, batch: int
    ) -> list[list[Rollout]]:
        """Responses from the servers. One that dies is restarted, gets the current weights, and is asked again.

        After the responses of a step, which ends with new weights, servers on the trainer's GPUs make room for it.
        """
        if self.config.rollout.colocate:
            release_cached_memory(dist.group.WORLD)  # one that is restarted wants its share to be free
        groups = generate_groups(
            self.fleet,
            prompts,
            group_size,
            sampling,
            seed=batch_seed(self.config, batch),
            weight_version=self.version,
            push_weights=lambda servers: self.sync.push(self.version, servers),
            group=dist.group.WORLD,
        )
        if batch != EVALUATION:
            on_first_rank(self._send_to_sleep, dist.group.WORLD)
        return groups

    def _send_to_sleep(self) -> None:
        """On rank 0. A server that does not would keep its memory, so it is stopped; `push_weights` starts it again."""
        for server, error in self.sync.sleep(self.fleet.alive()).items():
            self.fleet.stop_failed(server, error)

    def add_rewards(self, groups: list[list[Rollout]]) -> None:
        """Decode and score the responses in place; computed once, on rank 0."""
        rollouts = [rollout for group in groups for rollout in group]
        scores = on_first_rank(lambda: score_responses(rollouts, self.tokenizer, self.reward), dist.group.WORLD)
        apply_scores(rollouts, scores)

    def update(self, updates: list[list[Sample]]) -> dict[str, float]:
        """The optimizer updates of a step. Without samples, or with a non-finite gradient, one changes nothing."""
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

    def push_weights(self) -> None:
        """Give all servers the current weights and wake them; one that died meanwhile is restarted first."""
        if self.config.rollout.colocate:
            release_cached_memory(dist.group.WORLD)
        on_first_rank(lambda: self.fleet.restart_dead(), dist.group.WORLD)
        self.sync.push(self.version)

    def verify_weights(self) -> dict[str, float]:
        """Decode a fixed prompt on every server and compare its log-probs with the trainer's."""
        prompt = self.eval_prompts[0].tokens
        decoded = on_first_rank(lambda: decode_probe(self.fleet, prompt, PROBE_TOKENS), dist.group.WORLD)
        samples = [
            Sample(
                tokens=torch.tensor([*prompt, *(token for token, _ in pairs)]),
                prompt_length=len(prompt),
                weight=torch.zeros(len(pairs)),
            )
            for pairs in decoded
        ]
        # Greedy decoding reports log-probs at temperature 1, whatever the run samples with.
        trainer = self.actor.log_probs(samples, temperature=1.0)
        gaps = [
            verify_probe([p for _, p in pairs], ours.tolist(), self.config.rollout.probe_bound, server)
            for server, (pairs, ours) in enumerate(zip(decoded, trainer, strict=True))
        ]
        return {"sync/probe_abs_max": max(gaps)}

    def write_rollouts(self, groups: list[list[Rollout]]) -> None:
        """Keep a few of the step's rollouts for people to read."""
        if self.is_first_rank:
            write_rollouts(self.config.run_dir, self.step, groups, self.config.observe.rollouts_per_step)

    def log(self, metrics: dict[str, float]) -> None:
        metrics = {**metrics, "memory/peak_gb": platform.peak_memory_gb()}
        if self.metrics is not None:
            self.metrics.write(self.step, metrics)
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
        state = {"verb": "sft", "step": self.step, "version": self.version}
        if self.prompts is not None:
            state |= {"verb": "train", "prompts": self.prompts.state_dict()}
        checkpoint.save(
            self.config.run_dir / "checkpoints", self.step, self.actor, state, keep=self.config.checkpoint.keep
        )
        self.saved_step = self.step

    def begin(self) -> None:
        """Take the state of the newest checkpoint, if `resume` is set and there is one; then save the configuration.

        In this order, so that a resume that is refused leaves the run's own configuration in place.
        """
        if self.config.resume:
            self._resume()
        if self.is_first_rank:
            (self.config.run_dir / CONFIG).write_text(to_yaml(replace(self.config, resume=False)))

    def _resume(self) -> None:
        folder = self.config.run_dir / "checkpoints"
        if latest_step(folder) is None:
            if self.metrics is not None:
                self.metrics.truncate_after(-1)
            self.console.print("no checkpoint yet: starting from the beginning")
            return
        state = checkpoint.load(folder, self.actor)
        self.step, self.version = state["step"], state["version"]
        self.saved_step = self.step
        if self.prompts is not None:
            self.prompts.load_state_dict(state["prompts"])
        if self.metrics is not None:
            self.metrics.truncate_after(self.step)
        self.console.print(f"resumed after step {self.step}")

    def finish(self) -> None:
        """Export the student, write the report and print the summary."""
        config = self.config
        if config.checkpoint.export_hf:
            export_hf(
                self.source,
                {tensor.name: tensor.shape for tensor in self.source.metadata()},
                like=config.student.path,
                target=config.run_dir / "hf",
                dtype=platform.DTYPES[config.checkpoint.export_precision],
                write=self.is_first_rank,
            )
        if self.is_first_rank:
            rows = summary_rows(read_metrics(config.run_dir))
            report = write_report(config.run_dir, config.name, rows)
            summary_table(config.name, rows, self.console)
            self.console.print(f"report: {report}", soft_wrap=True)
            if config.checkpoint.export_hf:
                self.console.print(f"student: {config.run_dir / 'hf'}")
