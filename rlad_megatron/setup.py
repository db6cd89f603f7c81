"""Opens the parts of a run in order, and closes them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch.distributed as dist
from rich.console import Console

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.placement import server_devices
from rlad_megatron.data.prompts import PromptSource, build_prompts
from rlad_megatron.data.tokenizers import load_tokenizer
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.models.gathered import MegatronWeightSource
from rlad_megatron.models.shard_plan import build_shard_plan
from rlad_megatron.observe.checks import NonFiniteGuard
from rlad_megatron.observe.metrics import MetricsWriter
from rlad_megatron.observe.timers import PhaseTimers
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.parallel.groups import build_groups, seed_everything
from rlad_megatron.rewards.registry import load_reward
from rlad_megatron.run import LauncherHooks, Session
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.lengths import max_model_len
from rlad_megatron.servers.transfer.choice import choose_transfer
from rlad_megatron.servers.transfer.sync import WeightSync, release_cached_memory
from rlad_megatron.teacher.client import RemoteTeacher
from rlad_megatron.teacher.teacher import build_teacher
from rlad_megatron.trainer.actor import Actor


@contextmanager
def open_trainer(config: RunConfig, hooks: LauncherHooks) -> Iterator[Session]:
    """The student in training, and what watches it: enough for fine-tuning."""
    with ExitStack() as stack:
        shares_ranks = config.needs_teacher and not config.teacher_is_dedicated
        teacher_groups = build_groups(config.teacher.layout) if shares_ranks else None
        groups = build_groups(config.student.layout)
        seed_everything(config.train.seed, groups)
        spec = read_model_spec(config.student.path)
        plan = build_shard_plan(spec, config.student.layout)
        first = dist.get_rank() == 0
        actor = Actor(config, spec, groups, plan)
        session = Session(
            config=config,
            actor=actor,
            source=MegatronWeightSource(
                actor.entries,
                actor.parameters(),
                plan.hf_shapes,
                dtype=platform.DTYPES[config.student.precision],
                is_writer=groups.dp_rank == 0,
                group=dist.group.WORLD,
            ),
            tokenizer=load_tokenizer(config.student.path),
            console=Console(quiet=not first, highlight=False),
            timers=PhaseTimers(synchronize=platform.synchronize),
            guard=NonFiniteGuard(config.train.max_skipped_steps),
            hooks=hooks,
        )
        if shares_ranks:
            session.teacher = build_teacher(config, config.teacher, teacher_groups)
        elif config.teacher_is_dedicated:
            session.console.print("waiting for the teacher")
            address = on_first_rank(hooks.find_teacher, dist.group.WORLD)
            session.teacher = RemoteTeacher(address, config.rollout.request_timeout_s)
        if first:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            session.metrics = stack.enter_context(
                MetricsWriter(config.run_dir, config.observe.tensorboard, config.observe.wandb_project)
            )
        yield session


@contextmanager
def open_session(config: RunConfig, hooks: LauncherHooks) -> Iterator[Session]:
    """Everything of an RL run: trainer, teacher, prompts, reward, servers, and the weight sync between them."""
    with open_trainer(config, hooks) as session, ExitStack() as stack:
        session.reward = load_reward(config.data.reward)
        session.prompts = PromptSource(build_prompts(config.data, session.tokenizer, "train"), config.train.seed)
        session.eval_prompts = build_prompts(config.data, session.tokenizer, "test")
        session.begin()
        length = max_model_len(config, [*session.prompts.prompts, *session.eval_prompts])
        transfer = choose_transfer(config, platform.has_cuda())
        if config.rollout.colocate:
            release_cached_memory(dist.group.WORLD)  # a server wants its share to be free when it starts

        def start_fleet() -> list[str]:
            rollout, devices = config.rollout, None
            if hooks.find_servers is not None:
                session.console.print("waiting for the rollout servers")
                rollout = replace(rollout, urls=tuple(hooks.find_servers()))
            else:
                session.console.print("starting the rollout servers")
                devices = server_devices(config, platform.visible_devices())
            session.fleet = stack.enter_context(
                ServerFleet(rollout, config.run_dir, seed=config.train.seed, devices=devices, transfer=transfer)
            )
            session.fleet.start(config.student.path, length, session.tokenizer.eos_ids)
            return session.fleet.urls

        urls = on_first_rank(start_fleet, dist.group.WORLD)
        session.sync = stack.enter_context(
            WeightSync(
                session.source,
                urls,
                run_dir=config.run_dir,
                timeout_s=config.rollout.request_timeout_s,
                transfer=transfer,
            )
        )
        # Also at the start: servers of somebody else may hold anything, and a resumed student is not its folder.
        session.push_weights()
        session.verify_weights()
        yield session
