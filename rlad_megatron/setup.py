"""Builds a run, part by part, and closes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch.distributed as dist

from rlad_megatron import platform
from rlad_megatron.config import PHASED, RunConfig
from rlad_megatron.config.placement import server_devices
from rlad_megatron.data.prompts import PromptSource
from rlad_megatron.data.tokenizers import Tokenizer, load_tokenizer
from rlad_megatron.data.window import PromptWindow
from rlad_megatron.models.config_json import read_model_spec, read_specs
from rlad_megatron.models.shard_plan import build_shard_plan
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.observe.metrics import MetricsWriter
from rlad_megatron.observe.timeline import REWARDS_ROW, TEACHER_ROW, Timeline, server_row
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.parallel.groups import build_groups, seed_everything
from rlad_megatron.perf import Performance, rank_rate
from rlad_megatron.rewards.overlong import punish_overlong
from rlad_megatron.rewards.pool import RewardPool, score_groups
from rlad_megatron.rl_run import RlRun
from rlad_megatron.run import DistillRun, LauncherHooks, NoMetrics, TrainerRun
from rlad_megatron.run_prompts import RunPrompts
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.stream import Stage
from rlad_megatron.servers.transfer.choice import choose_transfer
from rlad_megatron.teacher.client import RemoteTeacher, TeacherAddress, ask_teacher
from rlad_megatron.teacher.teacher import Teacher, build_teacher
from rlad_megatron.trainer.actor import Actor
from rlad_megatron.types import Group


@contextmanager
def open_trainer(config: RunConfig, hooks: LauncherHooks) -> Iterator[TrainerRun]:
    """The student in training, and what watches it: enough for fine-tuning."""
    spec = read_model_spec(config.student.path)
    actor = _build_student(config, spec)
    with _open_metrics(config) as metrics:
        yield TrainerRun(
            config=config,
            hooks=hooks,
            actor=actor,
            tokenizer=load_tokenizer(config.student.path),
            metrics=metrics,
            timeline=Timeline(config.run_dir),
            perf=Performance(config, spec, None, rank_rate(config.student.precision)),
        )


@contextmanager
def open_distillation(config: RunConfig, hooks: LauncherHooks) -> Iterator[DistillRun]:
    """Student and teacher of an RL run without its servers, prompts and rewards."""
    specs = read_specs(config)
    actor, teacher = _build_models(config, hooks, specs)
    with _open_metrics(config) as metrics:
        yield DistillRun(
            config=config,
            hooks=hooks,
            actor=actor,
            tokenizer=load_tokenizer(config.student.path),
            metrics=metrics,
            timeline=Timeline(config.run_dir),
            perf=_performance(config, specs),
            teacher=teacher,
        )


@contextmanager
def open_run(config: RunConfig, hooks: LauncherHooks, prompts: RunPrompts) -> Iterator[RlRun]:
    """Everything of an RL run: trainer, teacher, reward and servers, which hold the student's weights."""
    specs = read_specs(config)
    actor, teacher = _build_models(config, hooks, specs)
    with _open_metrics(config) as metrics:
        reference = None
        if config.reference is not None:
            reference = build_teacher(config, config.reference, specs["student"], actor.groups)
        tokenizer = load_tokenizer(config.student.path)
        rewards = RewardPool(config.data, config.run_dir, config.train.ranks_per_node)
        timeline = Timeline(config.run_dir)
        stages = [_timed(timeline, REWARDS_ROW, "score", _scoring(config, tokenizer, rewards))]
        if isinstance(teacher, RemoteTeacher) and config.schedule != PHASED:
            tokens = config.train.microbatch_tokens * config.teacher_world_size  # a micro-batch for each of its ranks
            ask = partial(ask_teacher, teacher=teacher, objective=config.objective, tokens_per_request=tokens)
            stages.append(_timed(timeline, TEACHER_ROW, "log-probs", ask))
        run = RlRun(
            config=config,
            hooks=hooks,
            actor=actor,
            tokenizer=tokenizer,
            metrics=metrics,
            timeline=timeline,
            perf=_performance(config, specs),
            teacher=teacher,
            reference=reference,
            prompts=open_window(config, prompts),
            eval_prompts=prompts.held.test if prompts.held else [],
            dropped_prompts=prompts.dropped,
            rewards=rewards,
            fleet=ServerFleet(
                config,
                model_path=config.student.path,
                max_model_len=prompts.max_model_len,
                vocab_size=specs["student"].vocab_size,
                replay=specs["student"] if config.rollout.router_replay else None,
                eos_ids=tokenizer.eos_ids,
                run_dir=config.run_dir,
                devices=None if hooks.find_servers else server_devices(config, platform.visible_devices()),
                transfer=choose_transfer(config, platform.has_cuda()),
                find_urls=hooks.find_servers,
                token_file=hooks.token_file,
                drop_requested=hooks.drop_requested,
                student=actor,
                probe=prompts.probe,
                stages=stages,
                on_load=lambda server, count: timeline.count(server_row(server), "responses in flight", count),
            ),
        )
        run.begin()
        run.console.print(f"{'waiting for' if hooks.find_servers else 'starting'} the rollout servers")
        with run.rewards if run.is_first_rank else nullcontext(), run.fleet:
            # At the start too: external servers may hold anything, and a resumed student is not its folder.
            run.push_weights()
            run.verify_weights()
            yield run


def _build_models(
    config: RunConfig, hooks: LauncherHooks, specs: Mapping[str, ModelSpec]
) -> tuple[Actor, Teacher | RemoteTeacher | None]:
    """The student, and the teacher if the objective uses one."""
    shares_ranks = config.needs_teacher and not config.teacher_is_dedicated
    # Before the student's groups: Megatron's global state has to describe those.
    groups = build_groups(config.teacher.layout, config.train.distributed_timeout_s) if shares_ranks else None
    actor = _build_student(config, specs["student"])
    if groups is not None:
        return actor, build_teacher(config, config.teacher, specs["teacher"], groups)
    return actor, _find_teacher(config, hooks) if config.teacher_is_dedicated else None


def _performance(config: RunConfig, specs: Mapping[str, ModelSpec]) -> Performance:
    teacher = specs["teacher"] if config.needs_teacher else None
    return Performance(config, specs["student"], teacher, rank_rate(config.student.precision))


def _build_student(config: RunConfig, spec: ModelSpec) -> Actor:
    groups = build_groups(config.student.layout, config.train.distributed_timeout_s)
    seed_everything(config.train.seed, groups)
    return Actor(config, spec, groups, build_shard_plan(spec, config.student.layout))


def open_window(config: RunConfig, prompts: RunPrompts) -> PromptWindow | None:
    if prompts.held is None:
        return None
    rollout, source = config.rollout, PromptSource(prompts.held.train, config.train.seed)
    return PromptWindow(source, rollout.prompts_per_step, rollout.overprovision)


def _open_metrics(config: RunConfig) -> AbstractContextManager[MetricsWriter | NoMetrics]:
    if dist.get_rank() > 0:
        return nullcontext(NoMetrics())
    return MetricsWriter(config.run_dir, config.observe.tensorboard, config.observe.wandb_project)


def _timed(timeline: Timeline, row: str, name: str, stage: Stage) -> Stage:
    """The stage, with a span for each call."""

    def timed(groups: list[Group]) -> None:
        with timeline.span(row, name):
            stage(groups)

    return timed


def _scoring(config: RunConfig, tokenizer: Tokenizer, rewards: RewardPool) -> Stage:
    """Decodes and scores groups, with what `objective.overlong_buffer` adds."""
    longest, buffer = config.rollout.sampling.max_tokens, config.objective.overlong_buffer

    def score(groups: list[Group]) -> None:
        score_groups(groups, tokenizer, rewards)
        if buffer:
            punish_overlong(groups, longest, buffer)

    return score


def _find_teacher(config: RunConfig, hooks: LauncherHooks) -> RemoteTeacher:
    """The teacher on dedicated ranks."""

    def wait() -> TeacherAddress:
        print("waiting for the teacher", flush=True)
        return hooks.find_teacher()

    return RemoteTeacher(on_first_rank(wait, dist.group.WORLD), config.rollout.request_timeout_s)
