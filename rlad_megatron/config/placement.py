"""Checks that ranks and servers find their places, and a way for the weights between them."""

from __future__ import annotations

from rlad_megatron.config.tree import RunConfig
from rlad_megatron.errors import ConfigError


def validate_placement(config: RunConfig) -> None:
    """Ranks and servers must find a GPU each, unless they share on purpose. On CPUs there is nothing to share out."""
    _validate_teacher_ranks(config)
    train, rollout, teacher = config.train, config.rollout, config.teacher
    if rollout.colocate and rollout.nodes:
        raise ConfigError(
            f"rollout.colocate=true puts the servers on the trainer's GPUs, but rollout.nodes={rollout.nodes} gives "
            "them nodes of their own; use one of the two"
        )
    _validate_transfer(config)
    if not train.gpus_per_node:
        return
    if train.ranks_per_node > train.gpus_per_node:
        raise ConfigError(
            f"train.ranks_per_node={train.ranks_per_node} exceeds train.gpus_per_node={train.gpus_per_node}: each rank "
            f"needs a GPU of its own; use train.ranks_per_node={train.gpus_per_node}, and more train.nodes for the rest"
        )
    left = train.gpus_per_node if teacher.nodes else train.gpus_per_node - train.ranks_per_node
    if config.teacher_is_dedicated and teacher.ranks_per_node > left:
        where = "a node of its own" if teacher.nodes else "each of the trainer's nodes"
        raise ConfigError(
            f"teacher.ranks_per_node={teacher.ranks_per_node} exceeds the {left} GPUs that {where} has for them "
            f"(train.gpus_per_node={train.gpus_per_node}, train.ranks_per_node={train.ranks_per_node}); use "
            + ("more teacher.nodes" if teacher.nodes else "teacher.nodes")
        )
    if rollout.urls or config.objective.name == "cross_entropy":
        return  # no servers of our own
    tensor_parallel = rollout.tensor_parallel
    if tensor_parallel > train.gpus_per_node:
        raise ConfigError(
            f"rollout.tensor_parallel={tensor_parallel} exceeds train.gpus_per_node={train.gpus_per_node}, and a "
            f"server stays within a node; use at most {train.gpus_per_node}"
        )
    if rollout.nodes:
        where = f"rollout.nodes={rollout.nodes} of {train.gpus_per_node} GPUs"
        gpus, nodes, remedy = train.gpus_per_node, rollout.nodes, "more rollout.nodes"
    elif rollout.colocate:
        where = f"the trainer's {train.world_size} GPUs (rollout.colocate=true)"
        gpus, nodes, remedy = train.ranks_per_node, train.nodes, "rollout.nodes and rollout.colocate=false"
    else:
        beside = teacher.ranks_per_node if config.teacher_is_dedicated and not teacher.nodes else 0
        gpus, nodes = train.gpus_per_node - train.ranks_per_node - beside, train.nodes
        where = f"the {gpus * nodes} GPUs that the ranks leave on the trainer's nodes, and two tasks would share one"
        remedy = "rollout.colocate=true to share on purpose, or rollout.nodes"
    room = gpus // tensor_parallel * nodes
    if rollout.servers > room:
        raise ConfigError(
            f"rollout.servers={rollout.servers} of rollout.tensor_parallel={tensor_parallel} do not fit on {where}; "
            + (f"use at most {room}, or {remedy}" if room else f"use {remedy}")
        )


def _validate_teacher_ranks(config: RunConfig) -> None:
    """A teacher on ranks of its own. Whether they find GPUs: `validate_placement`."""
    teacher, train, rollout = config.teacher, config.train, config.rollout
    if teacher.nodes and not teacher.ranks_per_node:
        raise ConfigError(
            f"teacher.nodes={teacher.nodes} without ranks on them: teacher.ranks_per_node=0 puts the teacher on the "
            "trainer's ranks; set teacher.ranks_per_node, or use teacher.nodes=0"
        )
    if not teacher.ranks_per_node:
        return
    if not config.needs_teacher:
        raise ConfigError(
            f"teacher.ranks_per_node={teacher.ranks_per_node}, but objective.name={config.objective.name} asks no "
            "teacher; use teacher.ranks_per_node=0 and teacher.nodes=0"
        )
    if teacher.offload:
        raise ConfigError(
            "teacher.offload=true makes room for the trainer, but with "
            f"teacher.ranks_per_node={teacher.ranks_per_node} the teacher has ranks of its own; use one of the two"
        )
    if config.eval.teacher and train.gpus_per_node:
        raise ConfigError(
            f"eval.teacher=true serves the teacher before the run, on GPUs that its ranks (teacher.ranks_per_node="
            f"{teacher.ranks_per_node}) may hold; use eval.teacher=false, and `rlad evaluate` for the teacher"
        )
    if train.distributed_timeout_s <= rollout.request_timeout_s:
        raise ConfigError(
            f"train.distributed_timeout_s={train.distributed_timeout_s:g} must exceed rollout.request_timeout_s="
            f"{rollout.request_timeout_s:g}: the other ranks wait while rank 0 asks the teacher"
        )


def _validate_transfer(config: RunConfig) -> None:
    """NCCL joins different GPUs and CUDA IPC the same ones; neither exists on CPUs."""
    rollout = config.rollout
    if rollout.colocate and rollout.urls:
        raise ConfigError(
            "rollout.colocate=true puts the run's own servers on the trainer's GPUs, but rollout.urls names others; "
            "use one of the two"
        )
    if rollout.weight_transfer in ("nccl", "ipc") and not config.train.gpus_per_node:
        raise ConfigError(
            f"rollout.weight_transfer={rollout.weight_transfer} moves weights between GPUs, but train.gpus_per_node=0 "
            "is a run on CPUs; use rollout.weight_transfer=auto"
        )
    if rollout.weight_transfer == "nccl" and rollout.colocate:
        raise ConfigError(
            "rollout.weight_transfer=nccl cannot join two processes on one GPU, and rollout.colocate=true shares them; "
            "use rollout.weight_transfer=auto"
        )
    if rollout.weight_transfer == "ipc" and not rollout.colocate:
        raise ConfigError(
            "rollout.weight_transfer=ipc reaches servers on the trainer's own GPUs alone; use rollout.colocate=true, "
            "or rollout.weight_transfer=auto"
        )
