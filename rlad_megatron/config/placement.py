"""Where the ranks and servers of a run go, and the checks that they have room there.

Pure bookkeeping on the configuration, the same for `rlad plan`, local runs, Slurm and NeMo-Run. Ranks are in Megatron's
order: TP fastest, then CP, DP and PP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rlad_megatron.config.messages import Problems
from rlad_megatron.config.tree import LayoutConfig, RunConfig
from rlad_megatron.errors import ConfigError

Role = Literal["trainer", "teacher", "server"]


@dataclass(frozen=True)
class Task:
    """One process of a run: a rank of the trainer, a rank of a dedicated teacher, or a rollout server."""

    role: Role
    index: int  # rank in its world, or number of the server
    node: int  # the trainer's nodes come first, then the teacher's, then the servers'
    gpus: tuple[int, ...] = ()  # devices on that node; empty on CPUs
    host: str = ""  # name of the node, where it is known

    @property
    def kind(self) -> str:
        """What the index counts: "trainer rank", "teacher rank" or "server"."""
        return self.role if self.role == "server" else f"{self.role} rank"

    @property
    def name(self) -> str:
        """For messages, for example "server 1 on node n07"."""
        return f"{self.kind} {self.index} on node {self.host}"

    @property
    def file_stem(self) -> str:
        return f"{self.role}_{self.index}"


def place(
    config: RunConfig, nodes: Sequence[str] | None = None, *, only: Literal["teacher", "server"] | None = None
) -> tuple[Task, ...]:
    """All tasks of a valid configuration: the trainer's ranks, a dedicated teacher's ranks, the servers.

    nodes: host names of a job's nodes. Extra nodes stay idle. None: the hosts are not known.
    only: a role that has one machine to itself; its tasks start at GPU 0.

    Raises:
        ConfigError: the layout needs more nodes.
    """
    train, teacher, rollout = config.train, config.teacher, config.rollout
    needed = total_nodes(config)
    if nodes is not None and len(nodes) < needed:
        extra = f" + teacher.nodes={teacher.nodes}" if _teacher_nodes(config) else ""
        extra += f" + rollout.nodes={rollout.nodes}" if has_servers(config) else ""
        raise ConfigError(
            f"the layout needs {needed} nodes (train.nodes={train.nodes}{extra}), but the job has {len(nodes)}; "
            f"submit with --nodes={needed}"
        )

    def fill(role: Role, count: int, per_node: int, *, node: int, gpu: int, width: int = 1) -> Iterator[Task]:
        """Tasks of `width` GPUs, node after node, from `node` and on each node from `gpu`. The last may have fewer."""
        for index in range(count):
            at, first = node + index // per_node, gpu + index % per_node * width
            gpus = tuple(range(first, first + width)) if train.gpus_per_node else ()
            yield Task(role, index, at, gpus, nodes[at] if nodes else "")

    if only == "teacher":
        return tuple(fill(only, config.teacher_world_size, config.teacher_world_size, node=0, gpu=0))
    if only == "server":
        return tuple(fill(only, rollout.servers, rollout.servers, node=0, gpu=0, width=rollout.tensor_parallel))
    tasks = [*fill("trainer", train.world_size, train.ranks_per_node, node=0, gpu=0)]
    if config.teacher_is_dedicated:
        node, gpu = (train.nodes, 0) if teacher.nodes else (0, train.ranks_per_node)
        tasks += fill("teacher", config.teacher_world_size, teacher.ranks_per_node, node=node, gpu=gpu)
    if has_servers(config):
        node, share = (needed - rollout.nodes, rollout.nodes) if rollout.nodes else (0, train.nodes)
        gpu = 0 if rollout.nodes or rollout.colocate else _ranks_on_trainer_node(config)
        per_node = -(-rollout.servers // share)  # as srun's block distribution fills nodes
        tasks += fill("server", rollout.servers, per_node, node=node, gpu=gpu, width=rollout.tensor_parallel)
    return tuple(tasks)


def with_role(tasks: Sequence[Task], role: Role) -> tuple[Task, ...]:
    """The tasks of one role, by index."""
    return tuple(task for task in tasks if task.role == role)


def has_servers(config: RunConfig) -> bool:
    """Whether the run starts its own servers."""
    return config.generates and not config.rollout.urls


def total_nodes(config: RunConfig) -> int:
    return config.train.nodes + _teacher_nodes(config) + (config.rollout.nodes if has_servers(config) else 0)


def total_gpus(config: RunConfig) -> int:
    """GPUs that the run allocates. Clusters allocate whole nodes."""
    return total_nodes(config) * config.train.gpus_per_node


def stage_of(rank: int, layout: LayoutConfig, world_size: int) -> int:
    """The pipeline stage of a rank."""
    return rank * layout.pipeline_parallel // world_size


def _teacher_nodes(config: RunConfig) -> int:
    """Nodes that hold only the teacher."""
    return config.teacher.nodes if config.teacher_is_dedicated else 0


def _ranks_on_trainer_node(config: RunConfig) -> int:
    """Ranks on each of the trainer's nodes, including those of a dedicated teacher without nodes."""
    shared = config.teacher_is_dedicated and not config.teacher.nodes
    return config.train.ranks_per_node + (config.teacher.ranks_per_node if shared else 0)


def server_devices(config: RunConfig, visible: Sequence[str], *, alone: bool = False) -> list[str] | None:
    """CUDA_VISIBLE_DEVICES of each server of a run on one machine; None on CPUs and for servers of `rollout.urls`.

    visible: names of the machine's devices; empty on CPUs. alone: there are no ranks, so servers start at device 0.

    Raises:
        ConfigError: the run needs more devices than the machine has.
    """
    train, rollout, size = config.train, config.rollout, config.rollout.tensor_parallel
    if not visible or not train.gpus_per_node or rollout.urls:
        return None
    tasks = place(config, only="server" if alone else None)
    needed = max(gpu + 1 for task in tasks for gpu in task.gpus)
    if needed > len(visible):
        if alone:
            room = len(visible) // size
            ranks, remedy = "", f"rollout.servers={room}" if room else "a smaller rollout.tensor_parallel"
        else:
            teacher = f", teacher.ranks_per_node={config.teacher.ranks_per_node}" if config.teacher_is_dedicated else ""
            ranks = f"train.ranks_per_node={train.ranks_per_node}{teacher} and "
            remedy = "fewer" + ("" if rollout.colocate else ", or rollout.colocate=true")
        raise ConfigError(
            f"{ranks}rollout.servers={rollout.servers} of rollout.tensor_parallel={size} take {needed} GPUs, but this "
            f"machine shows {len(visible)} (CUDA_VISIBLE_DEVICES); use {remedy}"
        )
    return [",".join(visible[gpu] for gpu in task.gpus) for task in with_role(tasks, "server")]


def check_one_machine(config: RunConfig) -> None:
    """Raise ConfigError for a run that needs several nodes."""
    rollout_nodes = config.rollout.nodes if has_servers(config) else 0
    for name, nodes, here in (
        ("train.nodes", config.train.nodes, 1),
        ("teacher.nodes", _teacher_nodes(config), 0),
        ("rollout.nodes", rollout_nodes, 0),
    ):
        if nodes != here:
            gpus = config.train.gpus_per_node
            machine = f"on a machine with {gpus} GPUs" if gpus else "here"
            raise ConfigError(
                f"{name}={nodes}, but this runs on one machine only; submit the run with slurm/*.sh or "
                f"`rlad-nemo --executor slurm`, or use {name}={here} {machine}"
            )


def placement_problems(config: RunConfig) -> Problems:
    """Problems of ranks and servers that neither get their own GPUs nor share them by `rollout.colocate`.

    On CPUs only of the combination of fields.
    """
    train, rollout, teacher = config.train, config.rollout, config.teacher
    problems = _teacher_problems(config) | _server_problems(config)
    if not train.gpus_per_node:
        return problems
    left = train.gpus_per_node - (0 if teacher.nodes else train.ranks_per_node)
    where = "each of its nodes" if teacher.nodes else "each of the trainer's nodes"
    problems |= {
        f"train.ranks_per_node={train.ranks_per_node} exceeds train.gpus_per_node={train.gpus_per_node}: each rank "
        f"needs its own GPU; use train.ranks_per_node={train.gpus_per_node}, and more train.nodes for the rest": (
            train.ranks_per_node > train.gpus_per_node
        ),
        f"teacher.ranks_per_node={teacher.ranks_per_node} exceeds the {left} GPUs that {where} has for them "
        f"(train.gpus_per_node={train.gpus_per_node}, train.ranks_per_node={train.ranks_per_node}); use "
        f"{'more ' * (teacher.nodes > 0)}teacher.nodes": config.teacher_is_dedicated and teacher.ranks_per_node > left,
    }
    if not has_servers(config):
        return problems
    size = rollout.tensor_parallel
    gpus, nodes = train.gpus_per_node - _ranks_on_trainer_node(config), train.nodes
    where = f"the {gpus * nodes} GPUs that the ranks leave on the trainer's nodes, and two tasks would share one"
    remedy = "rollout.colocate=true to share on purpose, or rollout.nodes"
    if rollout.nodes:
        gpus, nodes = train.gpus_per_node, rollout.nodes
        where, remedy = f"rollout.nodes={nodes} of {gpus} GPUs", "more rollout.nodes"
    elif rollout.colocate:
        gpus = train.ranks_per_node
        where = f"the trainer's {train.world_size} GPUs (rollout.colocate=true)"
        remedy = "rollout.nodes and rollout.colocate=false"
    room = gpus // size * nodes
    return problems | {
        f"rollout.tensor_parallel={size} exceeds train.gpus_per_node={train.gpus_per_node}, and a server stays within "
        f"a node; use at most {train.gpus_per_node}": size > train.gpus_per_node,
        f"rollout.servers={rollout.servers} of rollout.tensor_parallel={size} do not fit on {where}; use "
        f"{f'at most {room}, or ' if room else ''}{remedy}": rollout.servers > room,
    }


def _teacher_problems(config: RunConfig) -> Problems:
    teacher, train, rollout = config.teacher, config.train, config.rollout
    ranks = f"teacher.ranks_per_node={teacher.ranks_per_node}"
    if not teacher.ranks_per_node:
        return {
            f"teacher.nodes={teacher.nodes} without ranks on them: {ranks} puts the teacher on the trainer's ranks; "
            "set teacher.ranks_per_node, or use teacher.nodes=0": teacher.nodes,
        }
    return {
        f"{ranks}, but objective.name={config.objective.name} uses no teacher; use teacher.ranks_per_node=0 and "
        "teacher.nodes=0": not config.needs_teacher,
        f"teacher.offload=true makes room for the trainer, but with {ranks} the teacher has dedicated ranks; use one "
        "of the two": teacher.offload,
        f"eval.teacher=true serves the teacher before the run, on GPUs that its ranks ({ranks}) may hold; use "
        "eval.teacher=false, and `rlad evaluate` for the teacher": config.eval.teacher and train.gpus_per_node,
        f"train.distributed_timeout_s={train.distributed_timeout_s:g} must exceed rollout.request_timeout_s="
        f"{rollout.request_timeout_s:g}: the other ranks wait while rank 0 asks the teacher": (
            train.distributed_timeout_s <= rollout.request_timeout_s
        ),
    }


def _server_problems(config: RunConfig) -> Problems:
    """NCCL connects different GPUs, CUDA IPC processes on the same one."""
    rollout, transfer = config.rollout, config.rollout.weight_transfer
    on_gpus = config.train.gpus_per_node > 0
    return {
        f"rollout.colocate=true puts the servers on the trainer's GPUs, but rollout.nodes={rollout.nodes} gives them "
        "dedicated nodes; use one of the two": rollout.colocate and rollout.nodes,
        "rollout.colocate=true puts the run's own servers on the trainer's GPUs, but rollout.urls names others; use "
        "one of the two": rollout.colocate and rollout.urls,
        "rollout.weight_transfer=ipc moves weights between GPUs, but train.gpus_per_node=0 is a run on CPUs; use "
        "rollout.weight_transfer=auto": transfer == "ipc" and not on_gpus,
        "rollout.weight_transfer=collective cannot connect two processes on one GPU, and rollout.colocate=true shares "
        "GPUs; use rollout.weight_transfer=auto": transfer == "collective" and rollout.colocate and on_gpus,
        "rollout.weight_transfer=ipc reaches only servers on the trainer's GPUs; use rollout.colocate=true, or "
        "rollout.weight_transfer=auto": transfer == "ipc" and not rollout.colocate,
    }
