"""The tasks of a job on its nodes by name, and whether a job can hold a run.

Where each task goes is `rlad_megatron.plan.placement`'s to say, as `rlad plan` shows it. Pure bookkeeping on names and
numbers: no torch, no Slurm, no device. Every task computes it from the configuration and the job's list of nodes, so
nothing has to be passed around.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.config_json import read_or_known_spec
from rlad_megatron.models.shard_plan import check_server_layout
from rlad_megatron.plan import placement
from rlad_megatron.plan.plan import make_plan

ROLES = {"rank": "trainer", "teacher": "teacher", "server": "server"}  # of the kinds of tasks in plan/placement.py


@dataclass(frozen=True)
class Task:
    """One process of the job."""

    role: str  # "trainer" | "teacher" (on ranks of its own) | "server"
    index: int  # rank, or number of the server
    node: str
    gpus: tuple[int, ...] = ()  # devices of the node; empty on CPUs

    @property
    def name(self) -> str:
        """As an error message calls it, for example "server 1 on node n07"."""
        return f"{self.role}{' rank' if self.role != 'server' else ''} {self.index} on node {self.node}"

    @property
    def file_stem(self) -> str:
        return f"{self.role}_{self.index}"


@dataclass(frozen=True)
class Step:
    """Tasks that one srun starts. They fill node after node."""

    role: str  # of its tasks
    first_node: int  # place in the job's list of nodes
    nodes: int
    tasks: int

    @property
    def tasks_per_node(self) -> int:
        """On every node but the last, which may have fewer."""
        return -(-self.tasks // self.nodes)


@dataclass(frozen=True)
class Placement:
    """All tasks of a run."""

    ranks: tuple[Task, ...]
    teachers: tuple[Task, ...]  # ranks of the teacher's own world
    servers: tuple[Task, ...]
    steps: tuple[Step, ...]  # the trainer's first, and no empty one

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (*self.ranks, *self.teachers, *self.servers)


def place(config: RunConfig, nodes: Sequence[str]) -> Placement:
    """Put the tasks of a valid configuration on nodes.

    Raises ConfigError when there are too few nodes. More than needed stay idle.
    """
    needed = placement.total_nodes(config)
    if len(nodes) < needed:
        own = f" + teacher.nodes={config.teacher.nodes}" if placement.own_teacher_nodes(config) else ""
        own += f" + rollout.nodes={config.rollout.nodes}" if placement.has_servers(config) else ""
        raise ConfigError(
            f"the layout needs {needed} nodes (train.nodes={config.train.nodes}{own}), but the job has {len(nodes)}; "
            f"submit with --nodes={needed}"
        )
    by_role: dict[str, list[placement.Task]] = {role: [] for role in ROLES.values()}
    for task in placement.place(config):
        by_role[ROLES[task.kind]].append(task)
    named = {
        role: tuple(Task(role, task.index, nodes[task.node], task.gpus) for task in tasks)
        for role, tasks in by_role.items()
    }
    steps = tuple(
        Step(role, tasks[0].node, len({task.node for task in tasks}), len(tasks))
        for role, tasks in by_role.items()
        if tasks
    )
    return Placement(named["trainer"], named["teacher"], named["server"], steps)


def check_job(config: RunConfig, nodes: int, gpus_per_node: int | None) -> None:
    """Raise a ConfigError unless a job of so many nodes and GPUs holds the run.

    gpus_per_node: None where the job does not count them, as on clusters without GPU scheduling.
    """
    if config.rollout.urls:
        raise ConfigError("rollout.urls is set, but the job starts its own servers; leave it empty")
    place(config, [""] * nodes)
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


def check_models(config: RunConfig) -> str:
    """Raise a ConfigError for a layout that does not divide the models; returns what does not fit, by estimate.

    Empty also where this machine cannot know: a model's folder, and the one that it lies in, may be on the nodes or in
    the container alone, where the run checks it.
    """
    for role, model in config.models:
        try:
            spec = read_or_known_spec(model.path, role)
        except ConfigError:
            if Path(model.path).parent.is_dir():
                raise
            return ""
        if role == "student" and config.generates:
            check_server_layout(spec, config.rollout.tensor_parallel)
    return make_plan(config).shortage


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
