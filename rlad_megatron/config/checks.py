"""Checks of fields against each other. A field by itself is checked when its section is built (config/tree.py)."""

from __future__ import annotations

from rlad_megatron.config.objectives import OBJECTIVES
from rlad_megatron.config.placement import validate_placement
from rlad_megatron.config.precision import validate_precision
from rlad_megatron.config.tree import ModelConfig, RunConfig
from rlad_megatron.errors import ConfigError


def validate(config: RunConfig) -> None:
    """Check fields against each other.

    Raises:
        ConfigError: one line that names the fields, their values and the remedy.
    """
    _validate_models(config)
    validate_precision(config)
    validate_placement(config)
    _validate_run(config)


def _validate_models(config: RunConfig) -> None:
    trainers = "train.nodes * train.ranks_per_node"
    dedicated = f"{'teacher' if config.teacher.nodes else 'train'}.nodes * teacher.ranks_per_node"
    worlds = {
        "student": (config.train.world_size, trainers),
        "teacher": (config.teacher_world_size, dedicated if config.teacher_is_dedicated else trainers),
    }
    for role, model in config.models:
        _validate_layout(role, model, *worlds[role])
    if not config.student.path:
        raise ConfigError("student.path is empty; give a folder in Hugging Face format")
    if len(config.models) > 1 and not config.teacher.path:
        why = f"objective.name={config.objective.name}" if config.needs_teacher else "eval.teacher=true"
        raise ConfigError(
            f"teacher.path is empty, but {why} needs a teacher; give a folder in Hugging Face format, "
            "or use objective.name=grpo and eval.teacher=false"
        )


def _validate_layout(role: str, model: ModelConfig, world_size: int, product: str) -> None:
    layout = model.layout
    if layout.sequence_parallel and layout.tensor_parallel == 1:
        raise ConfigError(
            f"{role}.layout.sequence_parallel=true splits tokens over tensor-parallel ranks, but {role}.layout."
            "tensor_parallel=1; use at least 2, or sequence_parallel=false"
        )
    if world_size % layout.model_ranks:
        raise ConfigError(
            f"{role}.layout: tensor_parallel={layout.tensor_parallel} * pipeline_parallel={layout.pipeline_parallel} "
            f"does not divide the {world_size} ranks ({product}); use sizes whose product is "
            f"{either(divisors(world_size))}, or a multiple of {layout.model_ranks} ranks"
        )


def _validate_run(config: RunConfig) -> None:
    rollout, optimizer, train = config.rollout, config.optimizer, config.train
    if OBJECTIVES[config.objective.name].needs_advantage and rollout.group_size == 1:
        raise ConfigError(
            f"rollout.group_size=1 gives no group-relative advantage for objective.name={config.objective.name}; "
            "use at least 2, or objective.name=on_policy_kl"
        )
    if rollout.sampling.top_p != 1.0:
        raise ConfigError(
            f"rollout.sampling.top_p={rollout.sampling.top_p} makes the sampler's distribution differ from the trained "
            "one; use 1.0 (evaluation has eval.sampling.top_p)"
        )
    if rollout.sampling.temperature == 0:
        raise ConfigError("rollout.sampling.temperature=0 samples one response only; use a number above 0")
    if rollout.port + rollout.servers > 65536:
        raise ConfigError(
            f"rollout.port={rollout.port} leaves too few ports for rollout.servers={rollout.servers}; "
            f"use at most {65536 - rollout.servers}"
        )
    if not config.data.eval_size:
        raise ConfigError("data.eval_size=0 leaves no prompts for evaluation; use at least 1")
    if rollout.prompts_per_step % train.updates_per_rollout:
        raise ConfigError(
            f"train.updates_per_rollout={train.updates_per_rollout} does not divide "
            f"rollout.prompts_per_step={rollout.prompts_per_step}: each update takes whole groups"
        )
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(f"optimizer.min_lr={optimizer.min_lr} exceeds optimizer.lr={optimizer.lr}; use at most that")
    if config.eval.teacher and rollout.urls:
        raise ConfigError(
            "eval.teacher=true starts a server for the teacher, but rollout.urls is set; "
            "use eval.teacher=false and `rlad evaluate`"
        )
    if train.distributed_timeout_s <= rollout.startup_timeout_s:
        raise ConfigError(
            f"train.distributed_timeout_s={train.distributed_timeout_s:g} must exceed rollout.startup_timeout_s="
            f"{rollout.startup_timeout_s:g}: the other ranks wait while rank 0 starts servers and generates"
        )


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def either(sizes: list[int]) -> str:
    """[1, 2, 4] as "1, 2 or 4"."""
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}" if others else last
