"""Which node and which GPUs each rank and each server takes. Megatron's rank order: TP fastest, then DP, then PP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlad_megatron.config import LayoutConfig, RunConfig
from rlad_megatron.errors import ConfigError


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
        servers = [task.gpus for task in place(config) if task.kind == "server"]
        ranks = train.ranks_per_node
    needed = max([ranks, *(gpu + 1 for gpus in servers for gpu in gpus)])
    if needed > len(visible):
        beside = f"train.ranks_per_node={ranks} and " if ranks else ""
        raise ConfigError(
            f"{beside}rollout.servers={rollout.servers} of rollout.tensor_parallel={rollout.tensor_parallel} take "
            f"{needed} GPUs, but this machine shows {len(visible)} (CUDA_VISIBLE_DEVICES); use fewer"
            + (", or rollout.colocate=true" if ranks and not rollout.colocate else "")
        )
    return [",".join(visible[gpu] for gpu in gpus) for gpus in servers]


def total_nodes(config: RunConfig) -> int:
    return config.train.nodes + (config.rollout.nodes if has_servers(config) else 0)


def total_gpus(config: RunConfig) -> int:
    """GPUs that the run is given: whole nodes, since that is how clusters hand them out."""
    return total_nodes(config) * config.train.gpus_per_node


def stage_of(rank: int, layout: LayoutConfig, world_size: int) -> int:
    """The pipeline stage of a rank."""
    return rank * layout.pipeline_parallel // world_size
