"""Print a plan."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlad_megatron.config import LayoutConfig, RunConfig
from rlad_megatron.config.placement import Task, place, stage_of, total_gpus, total_nodes
from rlad_megatron.models.precision import needs_in_words
from rlad_megatron.plan.cost import UPDATE_PASSES, forward_flops, recomputed_share, sent_bytes
from rlad_megatron.plan.memory import Model
from rlad_megatron.plan.plan import ESTIMATED, Item, Plan, ServerMemory, gb


def print_plan(plan: Plan, console: Console) -> None:
    """Print placement, models and memory of `plan`; sizes in GB of 1e9 bytes."""
    config = plan.config
    nodes = total_nodes(config)
    where = f"{total_gpus(config)} GPUs on" if config.train.gpus_per_node else "CPUs of"
    where += f" {nodes} node{'s' * (nodes > 1)}"
    ranks = f"{config.train.world_size} ranks"
    ranks += f" and {config.teacher_world_size} teacher ranks" * config.teacher_is_dedicated
    console.print(f"{config.name}: {config.objective.name}, {ranks}, {where}", soft_wrap=True)
    console.print(_placement(plan))
    console.print(_models(plan))
    console.print(_trainer(plan))
    if plan.teacher_ranks:
        console.print(_own_teacher(plan))
    if plan.server is not None:
        console.print(_server(plan.server, config))
    for note in _notes(plan):
        console.print(note, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        right = column in ("GB", "Parameters", "On a rank")
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _placement(plan: Plan) -> Table:
    """One row for each run of nodes with the same tasks."""
    table = _table("Placement", "Nodes", "GPUs of each", "Holds")
    by_node: dict[tuple[str, int], list[Task]] = {}
    for task in place(plan.config):
        by_node.setdefault((task.role, task.node), []).append(task)

    def same(tasks: list[Task]) -> tuple[str, str]:
        return _run([gpu for task in tasks for gpu in task.gpus]), _role(plan, tasks)

    for (gpus, role), group in groupby(by_node.values(), key=same):
        tasks = [task for tasks in group for task in tasks]
        kind = f"{tasks[0].kind.removeprefix('trainer ')}{'s' * (len(tasks) > 1)}"
        indices = _run([task.index for task in tasks])
        table.add_row(_run(sorted({task.node for task in tasks})), gpus or "-", f"{kind} {indices}: {role}")
    return table


def _role(plan: Plan, tasks: list[Task]) -> str:
    """What the tasks of one node hold."""
    config, kind = plan.config, tasks[0].role
    if kind == "server":
        shared = ", on the ranks' GPUs" if config.rollout.colocate else ""
        return f"vLLM, TP {config.rollout.tensor_parallel}{shared}"
    held = [("student", plan.student)] if kind == "trainer" else []
    if plan.teacher and config.teacher_is_dedicated == (kind == "teacher"):
        held.append(("teacher", plan.teacher))
    world = config.teacher_world_size if kind == "teacher" else config.train.world_size
    return ", ".join(f"{role}{_stages(model, tasks, world)}" for role, model in held)


def _stages(model: Model, tasks: list[Task], world: int) -> str:
    if model.layout.pipeline_parallel == 1:
        return ""
    return f" stage {_run(sorted({stage_of(task.index, model.layout, world) for task in tasks}))}"


def _run(numbers: list[int]) -> str:
    """Ascending numbers as first-last."""
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
            layout_text(layout, world),
            f"{most:,}",
            model.precision + (f", fp8 {model.fp8.recipe}" if model.fp8.enabled else ""),
        )
    return table


def layout_text(layout: LayoutConfig, world_size: int) -> str:
    return f"{layout.text} DP {world_size // layout.model_ranks}"


def _memory(title: str, items: tuple[Item, ...], *totals: tuple[str, int, str]) -> Table:
    """A row for each item, then a bold one for each total: (name, bytes, text)."""
    table = _table(f"Memory of {title}", "What", "GB", "How", "Made of")
    for item in items:
        table.add_row(item.name, _size(item.size), item.how, item.why)
    for name, size, text in totals:
        table.add_row(name, _size(size), ESTIMATED, text, style="bold")
    return table


def _size(size: int) -> str:
    return gb(size) if size >= 1e8 else f"{size / 1e9:.4f}"


def _trainer(plan: Plan) -> Table:
    rank, limit, totals = plan.fullest, plan.trainer_limit, []
    of = "of this machine's memory, for each rank" if limit is None else f"of {gb(limit)}{plan.neighbour}"
    if plan.resting_limit is not None:
        resting = max(rank.resting for rank in plan.ranks)
        totals.append(("at rest", resting, f"of {gb(plan.resting_limit)} next to a server that generates"))
    return _memory(f"the fullest rank ({rank.rank})", rank.items, *totals, ("peak", rank.size, of))


def _own_teacher(plan: Plan) -> Table:
    rank, limit = plan.fullest_teacher, plan.gpu_limit
    of = "of its machine's memory, for each rank" if limit is None else f"of {gb(limit)}"
    return _memory(f"the teacher's fullest rank ({rank.rank})", rank.items, ("in its pass", rank.size, of))


def _server(server: ServerMemory, config: RunConfig) -> Table:
    rollout = config.rollout
    what = "each GPU of a rollout server" if config.train.gpus_per_node else "a rollout server"
    return _memory(f"{what} (rollout.servers={rollout.servers})", server.items)


def _notes(plan: Plan) -> list[str]:
    notes = ["Exact: Megatron's own buffers. Estimated: see docs/parallelism.md. GB are 1e9 bytes."]
    notes += _price(plan)
    for role, model in (("student", plan.student), ("teacher", plan.teacher)):
        if model is not None and model.fp8.enabled:
            recipe = model.fp8.recipe
            notes.append(f"{role}.fp8.recipe={recipe} needs {needs_in_words(recipe)}; ranks check it at start-up.")
    notes += _queue(plan)
    if not plan.config.train.gpus_per_node:
        notes.append(
            "A run on CPUs: ranks and servers share the machine's memory, and nothing is refused. Not counted: "
            "interpreter and libraries, about 0.6 GB for each rank, more for each server."
        )
    return notes


def _queue(plan: Plan) -> list[str]:
    """A line if requests time out for sure where all responses are long: those that do not fit wait for the others."""
    rollout = plan.config.rollout
    if plan.server is None or not plan.config.train.gpus_per_node:
        return []
    requests, tokens, limit = rollout.max_concurrency, rollout.sampling.max_tokens, rollout.request_timeout_s
    needed = plan.server.queue_seconds(requests, tokens)
    if needed <= limit:
        return []
    return [
        f"rollout.request_timeout_s={limit:g} is too short if responses are long: a server has room for "
        f"{plan.server.responses} of its {requests} requests (rollout.max_concurrency) at a time, and {requests} "
        f"responses of {tokens} tokens take at least {needed:.0f} s; raise it, or lower rollout.max_concurrency."
    ]


def _price(plan: Plan) -> list[str]:
    """What layouts and recompute cost in time, as far as it can be counted: one line for each model."""
    share = recomputed_share(plan.student, plan.config.train, plan.longest or plan.tokens)
    again = f"recompute adds {share:.1%} to an update's operations" if share else "no products are recomputed"
    lines = [f"Student: {again}; {_sent(plan.student, trained=True)}."]
    if plan.teacher is not None:
        lines.append(f"Teacher: {_sent(plan.teacher, trained=False)}.")
    return [*lines, *_operations(plan)]


def _operations(plan: Plan) -> list[str]:
    """Of a step of the longest responses: one line. None for runs on traces, which are not read."""
    rollout, longest = plan.config.rollout, plan.longest
    if not plan.config.generates:
        return []
    count = rollout.prompts_per_step * rollout.group_size
    lengths, positions = [longest] * count, count * min(rollout.sampling.max_tokens, longest)
    update = UPDATE_PASSES * forward_flops(plan.student.spec, lengths, positions)
    if plan.config.head_pass_before_loss:
        update += forward_flops(plan.student.spec, [], positions)
    texts = [f"{update:.2e} operations in the update"]
    if plan.teacher is not None:
        texts.append(f"{forward_flops(plan.teacher.spec, lengths, positions):.2e} operations in the teacher's pass")
    return [f"A step of {count} samples of {longest} tokens: {', '.join(texts)}."]


def _sent(model: Model, *, trained: bool) -> str:
    sent = {kind: size for kind, size in sent_bytes(model, trained=trained).items() if size}
    kinds = " + ".join(f"{kind} {size / 1e6:.2f}" for kind, size in sent.items())
    return f"ranks send {kinds} MB for a token" if sent else "ranks send nothing for a token"
