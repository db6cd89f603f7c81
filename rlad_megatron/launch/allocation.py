"""What a Slurm allocation needs for a run: the srun steps, whether it is large enough, and the names of its nodes.

Pure bookkeeping: no torch, no Slurm, no device. Every task derives the same placement from the configuration and the
job's host list.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlad_megatron.config import RunConfig
from rlad_megatron.config.placement import Role, Task, place
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.config_json import read_or_known_spec
from rlad_megatron.models.shard_plan import check_server_layout
from rlad_megatron.plan.count import plan_models
from rlad_megatron.trainer.run_state import check_run_dir


@dataclass(frozen=True)
class Step:
    """The tasks that one srun starts, node after node."""

    role: Role
    first_node: int  # index in the job's list of nodes
    nodes: int
    tasks: int

    @property
    def tasks_per_node(self) -> int:
        """The last node may have fewer."""
        return -(-self.tasks // self.nodes)


def steps(tasks: Sequence[Task]) -> list[Step]:
    """The trainer's step, then those of a dedicated teacher and of the servers, if there are any."""
    groups = [(role, list(group)) for role, group in itertools.groupby(tasks, key=lambda task: task.role)]
    return [Step(role, group[0].node, len({task.node for task in group}), len(group)) for role, group in groups]


def check_submission(config: RunConfig, nodes: int, gpus_per_node: int | None, *, run_dir: bool) -> None:
    """`check_job` before sbatch. Prints a warning to stderr if the run is planned not to fit.

    run_dir: check the run folder too, unless only the nodes see the file system of `runs_dir`.
    """
    shortage = check_job(config, nodes, gpus_per_node)
    runs_dir = Path(config.runs_dir)
    if run_dir and (runs_dir.is_dir() or not runs_dir.is_absolute()):
        check_run_dir(config)
    if shortage:
        print(f"rlad: warning: {config.name} may not fit: {shortage}; `rlad plan` names a change", file=sys.stderr)


def check_job(config: RunConfig, nodes: int, gpus_per_node: int | None) -> str:
    """Raise ConfigError unless a job of this size holds the run; returns what does not fit, by estimate.

    Empty also where this machine cannot know: a model's folder and its parent may exist only on the nodes or in the
    container, where the run checks them.
    gpus_per_node: None if the job does not count them, as on clusters without GPU scheduling.
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
            "eval.teacher=true needs a server for the teacher, and the job's servers hold the student; "
            "use eval.teacher=false, and `rlad evaluate` for the teacher"
        )
    specs = {}
    for role, model in config.models:
        try:
            specs[role] = read_or_known_spec(model.path, role)
        except ConfigError:
            if Path(model.path).parent.is_dir():
                raise
            return ""
        if role == "student" and config.generates:
            check_server_layout(specs[role], config.rollout.tensor_parallel)
    return plan_models(config, specs["student"], specs["teacher"] if config.needs_teacher else None).shortage


def expand_nodes(hostlist: str) -> list[str]:
    """The names in a Slurm host list: "n[01-03,7],login" is n01, n02, n03, n7, login.

    `scontrol show hostnames` does the same, but a container may lack it.
    """
    names = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", hostlist):
        pieces = re.split(r"\[([^\]]*)\]", part)  # text and the inside of brackets, in turn
        choices = [_numbers(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
        names += ["".join(combination) for combination in itertools.product(*choices)]
    return names


def _numbers(ranges: str) -> list[str]:
    bounds = (item.partition("-")[::2] for item in ranges.split(","))
    return [f"{number:0{len(low)}d}" for low, high in bounds for number in range(int(low), int(high or low) + 1)]
