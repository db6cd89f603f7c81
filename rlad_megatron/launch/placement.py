"""Which node of a job runs which task: ranks of the trainer, and rollout servers with their GPUs.

Pure bookkeeping on names and numbers: no torch, no Slurm, no device. Every task computes it from the configuration
and the job's list of nodes, so nothing has to be passed around.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """One process of the job."""

    role: str  # "trainer" | "server"
    index: int  # rank, or number of the server
    node: str
    gpus: tuple[int, ...] = ()  # devices of the node; empty on CPUs

    @property
    def name(self) -> str:
        """As an error message calls it, for example "server 1 on node n07"."""
        return f"{'trainer rank' if self.role == 'trainer' else 'server'} {self.index} on node {self.node}"

    @property
    def file_stem(self) -> str:
        return f"{self.role}_{self.index}"


@dataclass(frozen=True)
class Placement:
    """All tasks of a run. Ranks fill node after node; servers too, on the nodes after the trainer's or on its own."""

    ranks: tuple[Task, ...]
    servers: tuple[Task, ...]
    first_server_node: int  # place in the job's list of nodes
    server_nodes: int  # nodes with a server

    @property
    def servers_per_node(self) -> int:
        """On every node but the last, which may have fewer."""
        return -(-len(self.servers) // self.server_nodes) if self.servers else 0


def nodes_needed(config: RunConfig) -> int:
    return config.train.nodes + (config.rollout.nodes if config.generates else 0)


def place(config: RunConfig, nodes: Sequence[str]) -> Placement:
    """Put the tasks of a valid configuration on nodes.

    Raises ConfigError when there are too few nodes. More than needed stay idle.
    """
    train, rollout = config.train, config.rollout
    needed = nodes_needed(config)
    if len(nodes) < needed:
        own = f" + rollout.nodes={rollout.nodes}" if config.generates else ""
        raise ConfigError(
            f"the layout needs {needed} nodes (train.nodes={train.nodes}{own}), but the job has {len(nodes)}; "
            f"submit with --nodes={needed}"
        )
    per_rank = 1 if train.gpus_per_node else 0
    ranks = tuple(
        Task("trainer", rank, nodes[rank // train.ranks_per_node], (rank % train.ranks_per_node,) * per_rank)
        for rank in range(train.world_size)
    )
    if not config.generates:
        return Placement(ranks, (), 0, 0)
    first = train.nodes if rollout.nodes else 0
    each = -(-rollout.servers // (rollout.nodes or train.nodes))
    # On the trainer's nodes the servers take the GPUs after the ranks', or the same ones.
    first_gpu = 0 if rollout.nodes or rollout.colocate else train.ranks_per_node
    servers = []
    for index in range(rollout.servers):
        start = first_gpu + index % each * rollout.tensor_parallel
        gpus = range(start, start + rollout.tensor_parallel) if train.gpus_per_node else ()
        servers.append(Task("server", index, nodes[first + index // each], tuple(gpus)))
    return Placement(ranks, tuple(servers), first, -(-rollout.servers // each))


def check_job(config: RunConfig, nodes: int, gpus_per_node: int | None) -> None:
    """Raise a ConfigError unless a job of so many nodes and GPUs holds the run.

    gpus_per_node: None where the job does not count them, as on clusters without GPU scheduling.
    """
    place(config, [""] * nodes)
    check_engine_heads(config)
    if gpus_per_node is not None and gpus_per_node < config.train.gpus_per_node:
        raise ConfigError(
            f"train.gpus_per_node={config.train.gpus_per_node}, but the job has {gpus_per_node} GPUs on each node; "
            f"submit with --gpus-per-node={config.train.gpus_per_node}"
        )
    if config.generates and config.eval.teacher:
        raise ConfigError(
            "eval.teacher=true needs a server of its own for the teacher, and the job's servers hold the student; "
            "use eval.teacher=false, and `rlad evaluate` for the teacher"
        )
    if config.rollout.urls:
        raise ConfigError("rollout.urls is set, but the job starts its own servers; leave it empty")


def check_engine_heads(config: RunConfig) -> None:
    """Raise a ConfigError if vLLM cannot cut the student's heads into rollout.tensor_parallel parts.

    Says nothing about a student that is not there; that is found later, where models are read.
    """
    file = Path(config.student.path) / "config.json"
    if not config.generates or not file.is_file():
        return
    model, parts = json.loads(file.read_text()), config.rollout.tensor_parallel
    heads = model.get("num_attention_heads", parts)
    if heads % parts:
        raise ConfigError(
            f"rollout.tensor_parallel={parts} does not divide the {heads} attention heads of {config.student.path}; "
            "use a divisor"
        )


def expand_nodes(hostlist: str) -> list[str]:
    """The names in a Slurm host list: "n[01-03,7],login" is n01, n02, n03, n7, login."""
    names = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", hostlist):
        pieces = re.split(r"\[([^\]]*)\]", part)  # text and the inside of brackets, in turn
        choices = [_numbers(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
        names += ["".join(combination) for combination in itertools.product(*choices)]
    return names


def _numbers(ranges: str) -> list[str]:
    numbers = []
    for item in ranges.split(","):
        low, _, high = item.partition("-")
        numbers += [f"{number:0{len(low)}d}" for number in range(int(low), int(high or low) + 1)]
    return numbers
