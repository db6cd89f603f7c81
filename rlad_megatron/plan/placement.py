"""Which node and which GPUs each rank and each server takes: the trainer's ranks, the teacher's own, the servers.

Megatron's rank order: TP fastest, then DP, then PP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlad_megatron.config import LayoutConfig, RunConfig
from rlad_megatron.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """One rank or one server on one node."""

    kind: str  # "rank" (of the trainer) | "teacher" (a rank of its own) | "server"
    index: int  # of the rank in its world, or of the server
    node: int  # the trainer's nodes come first
    gpus: tuple[int, ...]  # on that node; empty on CPUs


def has_servers(config: RunConfig) -> bool:
    """Whether the run starts servers of its own."""
    return config.generates and not config.rollout.urls


def place(config: RunConfig) -> list[Task]:
    """Every rank and server of a validated configuration: trainer, teacher, servers. A server stays within a node."""
    train, teacher = config.train, config.teacher
    tasks = _place_ranks(config, "rank", train.world_size, train.ranks_per_node, first_node=0, first_gpu=0)
    if config.teacher_is_dedicated:
        # On the trainer's nodes they take the GPUs after the trainer's.
        first_node, first_gpu = (train.nodes, 0) if teacher.nodes else (0, train.ranks_per_node)
        tasks += _place_ranks(
            config,
            "teacher",
            config.teacher_world_size,
            teacher.ranks_per_node,
            first_node=first_node,
            first_gpu=first_gpu,
        )
    return tasks + (_place_servers(config) if has_servers(config) else [])


def _place_ranks(
    config: RunConfig, kind: str, world_size: int, each: int, *, first_node: int, first_gpu: int
) -> list[Task]:
    return [
        Task(
            kind,
            rank,
            first_node + rank // each,
            (first_gpu + rank % each,) if config.train.gpus_per_node else (),
        )
        for rank in range(world_size)
    ]


def _place_servers(config: RunConfig) -> list[Task]:
    """As many on each node, the last one may have fewer: srun's block distribution (slurm/job.sh)."""
    train, rollout, teacher = config.train, config.rollout, config.teacher
    own = train.nodes + own_teacher_nodes(config)
    first_node, nodes = (own, rollout.nodes) if rollout.nodes else (0, train.nodes)
    each = -(-rollout.servers // nodes)
    # On the trainer's nodes they take the GPUs after the ranks', or the trainer's.
    beside = teacher.ranks_per_node if config.teacher_is_dedicated and not teacher.nodes else 0
    first_gpu = 0 if rollout.nodes or rollout.colocate else train.ranks_per_node + beside
    tasks = []
    for index in range(rollout.servers):
        start = first_gpu + index % each * rollout.tensor_parallel
        gpus = range(start, start + rollout.tensor_parallel) if train.gpus_per_node else ()
        tasks.append(Task("server", index, first_node + index // each, tuple(gpus)))
    return tasks


def server_devices(config: RunConfig, visible: Sequence[str], *, alone: bool = False) -> list[str] | None:
    """CUDA_VISIBLE_DEVICES of each server of a run on one machine; None where there is nothing to choose.

    visible: the machine's devices by the names that this run knows them by; empty on CPUs. alone: no ranks run beside
    the servers, which then begin at the first device.

    Raises:
        ConfigError: the machine has fewer devices than the run takes.
    """
    train, rollout = config.train, config.rollout
    if not visible or not train.gpus_per_node or rollout.urls:
        return None
    if alone:
        size = rollout.tensor_parallel
        servers = [tuple(range(index * size, (index + 1) * size)) for index in range(rollout.servers)]
        ranks = 0
    else:
        tasks = place(config)
        servers = [task.gpus for task in tasks if task.kind == "server"]
        ranks = sum(task.kind != "server" for task in tasks)
    needed = max([ranks, *(gpu + 1 for gpus in servers for gpu in gpus)])
    if needed > len(visible):
        beside = f"train.ranks_per_node={train.ranks_per_node} and " if ranks else ""
        if ranks and config.teacher_is_dedicated:
            beside = beside.replace(" and ", f", teacher.ranks_per_node={config.teacher.ranks_per_node} and ")
        raise ConfigError(
            f"{beside}rollout.servers={rollout.servers} of rollout.tensor_parallel={rollout.tensor_parallel} take "
            f"{needed} GPUs, but this machine shows {len(visible)} (CUDA_VISIBLE_DEVICES); use "
            + (f"rollout.servers={len(visible) // rollout.tensor_parallel}" if not ranks else "fewer")
            + (", or rollout.colocate=true" if ranks and not rollout.colocate else "")
        )
    return [",".join(visible[gpu] for gpu in gpus) for gpus in servers]


def check_one_machine(config: RunConfig) -> None:
    """Raise a ConfigError for a run that has nodes of a cluster."""
    asked = {"train.nodes": (config.train.nodes, 1), "teacher.nodes": (own_teacher_nodes(config), 0)}
    asked["rollout.nodes"] = (config.rollout.nodes if has_servers(config) else 0, 0)
    for name, (nodes, here) in asked.items():
        if nodes != here:
            raise ConfigError(f"{name}={nodes}: `rlad` runs on one machine; use {name}={here} here, or slurm/*.sh")


def own_teacher_nodes(config: RunConfig) -> int:
    """Nodes that hold nothing but the teacher."""
    return config.teacher.nodes if config.teacher_is_dedicated else 0


def total_nodes(config: RunConfig) -> int:
    return config.train.nodes + own_teacher_nodes(config) + (config.rollout.nodes if has_servers(config) else 0)


def total_gpus(config: RunConfig) -> int:
    """GPUs that the run is given: whole nodes, since that is how clusters hand them out."""
    return total_nodes(config) * config.train.gpus_per_node


def stage_of(rank: int, layout: LayoutConfig, world_size: int) -> int:
    """The pipeline stage of a rank."""
    return rank * layout.pipeline_parallel // world_size
