"""Print a plan."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlad_megatron.models.precision import needs_in_words
from rlad_megatron.plan.memory import Model
from rlad_megatron.plan.placement import Task, place, stage_of, total_gpus, total_nodes
from rlad_megatron.plan.plan import ESTIMATED, Item, Plan, gb

KINDS = {"rank": "rank", "teacher": "teacher rank", "server": "server"}  # of placement's tasks, in words


def print_plan(plan: Plan, console: Console) -> None:
    """Placement, models and memory of `plan`; sizes in GB of 1e9 bytes."""
    config = plan.config
    nodes = total_nodes(config)
    where = f"{total_gpus(config)} GPUs on" if config.train.gpus_per_node else "CPUs of"
    where += f" {nodes} node{'s' * (nodes > 1)}"
    ranks = f"{config.train.world_size} ranks"
    ranks += f" and {config.teacher_world_size} of the teacher's own" * config.teacher_is_dedicated
    console.print(f"{config.name}: {config.objective.name}, {ranks}, {where}", soft_wrap=True)
    console.print(_placement(plan))
    console.print(_models(plan))
    console.print(_trainer(plan))
    if plan.teacher_ranks:
        console.print(_own_teacher(plan))
    if plan.server is not None:
        console.print(_server(plan))
    for note in _notes(plan):
        console.print(note, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        right = column in ("GB", "Parameters", "On a rank")
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _placement(plan: Plan) -> Table:
    """One row for neighbouring nodes that hold the same: the trainer's ranks, the teacher's own, the servers."""
    table = _table("Placement", "Nodes", "GPUs of each", "Holds")
    by_node: dict[tuple[str, int], list[Task]] = {}
    for task in place(plan.config):
        by_node.setdefault((task.kind, task.node), []).append(task)

    def same(tasks: list[Task]) -> tuple[str, str]:
        return _run([gpu for task in tasks for gpu in task.gpus]), _role(plan, tasks)

    for (gpus, role), group in groupby(by_node.values(), key=same):
        tasks = [task for tasks in group for task in tasks]
        kind = f"{KINDS[tasks[0].kind]}{'s' * (len(tasks) > 1)}"
        indices = _run([task.index for task in tasks])
        table.add_row(_run(sorted({task.node for task in tasks})), gpus or "-", f"{kind} {indices}: {role}")
    return table


def _role(plan: Plan, tasks: list[Task]) -> str:
    """What the tasks of one node are for."""
    if tasks[0].kind == "server":
        shared = ", on the ranks' GPUs" if plan.config.rollout.colocate else ""
        return f"vLLM, TP {plan.config.rollout.tensor_parallel}{shared}"
    config = plan.config
    if tasks[0].kind == "teacher":
        return f"teacher{_stages(plan.teacher, tasks, config.teacher_world_size)}"
    text = f"student{_stages(plan.student, tasks, config.train.world_size)}"
    shares_ranks = plan.teacher and not config.teacher_is_dedicated
    return text + (f", teacher{_stages(plan.teacher, tasks, config.train.world_size)}" if shares_ranks else "")


def _stages(model: Model, tasks: list[Task], world: int) -> str:
    if model.layout.pipeline_parallel == 1:
        return ""
    return f" stage {_run(sorted({stage_of(task.index, model.layout, world) for task in tasks}))}"


def _run(numbers: list[int]) -> str:
    """Ascending numbers, as first and last."""
    return "-".join(str(number) for number in dict.fromkeys([*numbers[:1], *numbers[-1:]]))


def _models(plan: Plan) -> Table:
    table = _table("Models", "Role", "Model", "Parameters", "Layout", "On a rank", "Precision")
    config = plan.config
    for role, model, path, world in (
        ("student", plan.student, config.student.path, config.train.world_size),
        ("teacher", plan.teacher, config.teacher.path, config.teacher_world_size),
    ):
        if model is None:
            continue
        layout = model.layout
        most = max(model.parameters(stage) for stage in range(layout.pipeline_parallel))
        table.add_row(
            role,
            Path(path).name,
            f"{model.total_parameters:,}",
            f"TP {layout.tensor_parallel} PP {layout.pipeline_parallel} DP {world // layout.model_ranks}",
            f"{most:,}",
            model.precision + (f", fp8 {model.fp8.recipe}" if model.fp8.enabled else ""),
        )
    return table


def _rows(table: Table, items: tuple[Item, ...]) -> None:
    for item in items:
        table.add_row(item.name, _size(item.size), item.how, item.why)


def _size(size: int) -> str:
    return gb(size) if size >= 1e8 else f"{size / 1e9:.4f}"


def _trainer(plan: Plan) -> Table:
    rank = plan.fullest
    table = _table(f"Memory of the fullest rank ({rank.rank})", "What", "GB", "How", "Made of")
    _rows(table, rank.items)
    limit = plan.trainer_limit
    of = "of this machine's memory, for each rank" if limit is None else f"of {gb(limit)}"
    if plan.resting_limit is not None:
        resting = max(rank.resting for rank in plan.ranks)
        beside = f"of {gb(plan.resting_limit)} beside a server that generates"
        table.add_row("at rest", _size(resting), ESTIMATED, beside, style="bold")
        of += (
            " beside a server that sleeps" if plan.config.rollout.sleep_level else " beside a server, which stays awake"
        )
    table.add_row("at its fullest moment", _size(rank.size), ESTIMATED, of, style="bold")
    return table


def _own_teacher(plan: Plan) -> Table:
    rank, train = plan.fullest_teacher, plan.config.train
    table = _table(f"Memory of the teacher's fullest rank ({rank.rank})", "What", "GB", "How", "Made of")
    _rows(table, rank.items)
    of = f"of {train.gpu_memory_gb:.1f}" if train.gpus_per_node else "of its machine's memory, for each rank"
    table.add_row("in its pass", _size(rank.size), ESTIMATED, of, style="bold")
    return table


def _server(plan: Plan) -> Table:
    server, rollout = plan.server, plan.config.rollout
    what = "each GPU of a rollout server" if plan.config.train.gpus_per_node else "a rollout server"
    table = _table(f"Memory of {what} (rollout.servers={rollout.servers})", "What", "GB", "How", "Made of")
    _rows(table, server.items)
    responses = f"{server.responses} of {server.longest} tokens each; rollout.max_concurrency={rollout.max_concurrency}"
    table.add_row("requests that fit", "", ESTIMATED, responses, style="bold")
    return table


def _notes(plan: Plan) -> list[str]:
    notes = ["Exact: Megatron's own buffers. Estimated: docs/parallelism.md says how. GB are 1e9 bytes."]
    for role, model in (("student", plan.student), ("teacher", plan.teacher)):
        if model is not None and model.fp8.enabled:
            recipe = model.fp8.recipe
            notes.append(f"{role}.fp8.recipe={recipe} needs {needs_in_words(recipe)}; ranks check it when they start.")
    if not plan.config.train.gpus_per_node:
        notes.append("A run on CPUs: ranks and servers share the machine's memory, and nothing is refused.")
    return notes
