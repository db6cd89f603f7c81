"""Which node and which GPUs each rank and each server takes. Megatron's rank order: TP fastest, then DP, then PP."""

from __future__ import annotations

from dataclasses import dataclass

from rlad_megatron.config import LayoutConfig, RunConfig


@dataclass(frozen=True)
class Task:
    """One rank or one server on one node."""

    kind: str  # "rank" | "server"
    index: int  # of the rank in the trainer's world, or of the server
    node: int  # the trainer's nodes come first
    gpus: tuple[int, ...]  # on that node; empty on CPUs


def has_servers(config: RunConfig) -> bool:
    """Whether the run starts servers of its own."""
    return config.generates and not config.rollout.urls


def place(config: RunConfig) -> list[Task]:
    """Every rank and server of a validated configuration, ranks first. A server stays within a node."""
    train = config.train
    on_gpus = train.gpus_per_node > 0
    tasks = [
        Task("rank", rank, rank // train.ranks_per_node, (rank % train.ranks_per_node,) if on_gpus else ())
        for rank in range(train.world_size)
    ]
    return tasks + (_place_servers(config) if has_servers(config) else [])


def _place_servers(config: RunConfig) -> list[Task]:
    """As many on each node, the last one may have fewer: srun's block distribution (slurm/job.sh)."""
    train, rollout = config.train, config.rollout
    first_node, nodes = (train.nodes, rollout.nodes) if rollout.nodes else (0, train.nodes)
    each = -(-rollout.servers // nodes)
    # On the trainer's nodes they take the GPUs after the ranks', or the same ones.
    first_gpu = 0 if rollout.nodes or rollout.colocate else train.ranks_per_node
    tasks = []
    for index in range(rollout.servers):
        start = first_gpu + index % each * rollout.tensor_parallel
        gpus = range(start, start + rollout.tensor_parallel) if train.gpus_per_node else ()
        tasks.append(Task("server", index, first_node + index // each, tuple(gpus)))
    return tasks


def total_nodes(config: RunConfig) -> int:
    return config.train.nodes + (config.rollout.nodes if has_servers(config) else 0)


def total_gpus(config: RunConfig) -> int:
    """GPUs that the run is given: whole nodes, since that is how clusters hand them out."""
    return total_nodes(config) * config.train.gpus_per_node


def stage_of(rank: int, layout: LayoutConfig, world_size: int) -> int:
    """The pipeline stage of a rank."""
    return rank * layout.pipeline_parallel // world_size
