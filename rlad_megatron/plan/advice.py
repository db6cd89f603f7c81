"""The cheapest change that makes a configuration fit without changing what the run computes.

Fewest GPUs first, then least slowdown. The search starts with all savings of `_steps` and every layout of the models;
then it drops each saving that the run fits without, the most expensive first, and keeps the cheapest layouts at their
place in that order. It never suggests options that change what is learned (FP8, moments in bf16); docs/precision.md has
those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from rlad_megatron.config import LayoutConfig, RunConfig, validate
from rlad_megatron.config.placement import total_gpus
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.shard_plan import check_layout
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.plan.cost import sent_bytes
from rlad_megatron.plan.count import plan_models
from rlad_megatron.plan.memory import Model
from rlad_megatron.plan.plan import Plan

MORE_NODES = (1, 2, 4, 8)  # factors on the trainer's nodes and on a dedicated teacher's
SIZES = (1, 2, 4, 8, 16)  # of tensor, pipeline, context and expert parallelism
UTILIZATIONS = (0.9, 0.7, 0.5, 0.4, 0.3, 0.2)  # of a server's GPUs

Saving = tuple[str, object]  # a field and its new value
Step = Saving | None  # None: other layouts
Layouts = tuple[LayoutConfig, LayoutConfig]  # the student's and the teacher's; `_changed` sets sequence parallelism


def cheapest_change(plan: Plan) -> str:
    """Overrides that make `plan` fit, as the user would type them; empty if none do."""
    candidates = [(served, _possible_steps(served)) for served in _with_room_for_servers(plan)]
    for nodes in _more_nodes(plan.config):
        for served, steps in candidates:
            found = _ranks_that_fit(served, _with(served.config, nodes), steps)
            if found:
                return " ".join(differences(plan.config, found))
    return ""


def _with_room_for_servers(plan: Plan) -> list[Plan]:
    """Plans whose servers fit: for each number of GPUs per server, the smallest sufficient share of them.

    Both start at their present values. Dedicated servers take no memory from the ranks: the first plan is enough.
    """
    rollout, found = plan.config.rollout, []
    now = rollout.gpu_memory_utilization
    if not rollout.colocate and not plan.server_shortage:
        return [plan]
    shares = [now, *(share for share in reversed(UTILIZATIONS) if share > now)]
    for size in (rollout.tensor_parallel, *(size for size in SIZES if size > rollout.tensor_parallel)):
        servers = max(1, rollout.servers * rollout.tensor_parallel // size)
        for share in shares if rollout.colocate else shares[-1:]:
            changed = replace(rollout, gpu_memory_utilization=share, tensor_parallel=size, servers=servers)
            served = plan_candidate(plan, replace(plan.config, rollout=changed))
            if served and not served.server_shortage:
                found.append(served)
                break
    return found if rollout.colocate else found[:1]


def _ranks_that_fit(plan: Plan, config: RunConfig, steps: list[Step]) -> RunConfig | None:
    """`config` with the cheapest change for the ranks of trainer and teacher; None if no change fits."""
    costs = _costs(plan, config)
    cheapest_first = sorted(costs, key=costs.__getitem__)
    if not any(_fitting(plan, config, steps, reversed(cheapest_first))):
        return None
    before, after = steps[: steps.index(None)], steps[steps.index(None) + 1 :]
    for step in reversed(after):  # dearer than other layouts
        fewer = [other for other in after if other != step]
        if any(_fitting(plan, config, [*before, *fewer], reversed(cheapest_first))):
            after = fewer
    least = costs[next(_fitting(plan, config, [*before, *after], cheapest_first))]
    equal = [layouts for layouts in cheapest_first if costs[layouts] == least]
    found = list(_fitting(plan, config, [*before, *after], equal))
    for step in reversed(before):
        fewer = [other for other in before if other != step]
        if enough := list(_fitting(plan, config, [*fewer, *after], found)):
            before, found = fewer, enough
    return _changed(config, [*before, *after], found[0])


def _fitting(plan: Plan, config: RunConfig, steps: list[Step], among: Iterable[Layouts]) -> Iterator[Layouts]:
    """Those layouts in which `config` fits after the steps, in the given order.

    Each layout is planned once, next to the other model as it is; then the two are put together.
    """
    config = _with(config, filter(None, steps))
    own = _own_layouts(config)

    @cache
    def planned(student: LayoutConfig, teacher: LayoutConfig) -> Plan | None:
        return plan_candidate(plan, _changed(config, [], (student, teacher)))

    for layouts in among:
        student, teacher = planned(layouts[0], own[1]), planned(own[0], layouts[1])
        if student and teacher and student.tokens != teacher.tokens:  # rounded up to different multiples
            student = teacher = planned(*layouts)
        if student and teacher and not student.server_shortage and student.fits_with_teacher_of(teacher):
            yield layouts


def _steps(plan: Plan) -> Iterator[Step]:
    """Changes that save memory on the same GPUs, the least slowdown first."""
    config = plan.config
    train, rollout, optimizer = config.train, config.rollout, config.optimizer
    # Free: sums over ranks are split differently, the float32 copy is stored differently, and the next push brings the
    # weights that a sleeping server drops.
    yield "loss.fused", True
    yield "student.layout.sequence_parallel", True
    if config.needs_teacher:
        yield "teacher.layout.sequence_parallel", True
    if rollout.colocate:
        yield "rollout.sleep_level", 2
    if not optimizer.precision_aware:
        yield "optimizer.precision_aware", True
    # Smaller matrix products.
    yield "loss.memory_mb", min(config.loss.memory_mb, 256)
    shorter = (train.microbatch_tokens // divisor for divisor in (2, 4, 8))
    for tokens in [*(tokens for tokens in shorter if tokens > plan.longest), plan.longest]:
        if 0 < tokens < train.microbatch_tokens:
            yield "train.microbatch_tokens", tokens
    # The weights are copied to the GPU once per step.
    if config.needs_teacher:
        yield "teacher.offload", True
    if config.reference is not None:
        yield "objective.reference_offload", True
    # The feed-forward part of an update's forward pass runs twice.
    if train.recompute == "none":
        yield "train.recompute", "selective"
    # Fewer concurrent responses.
    for share in UTILIZATIONS:
        if rollout.colocate and share < rollout.gpu_memory_utilization:
            yield "rollout.gpu_memory_utilization", share
    yield None
    yield "train.recompute", "full"  # an update's forward pass runs twice
    for share in (0.5, 1.0):  # Adam on the host; the node's ranks share its memory
        if share > optimizer.offload:
            yield "optimizer.offload", share


def _possible_steps(plan: Plan) -> list[Step]:
    """The steps that change something, are valid with the ones before, and leave room for servers.

    Tried in the present layouts and in the smallest tensor-parallel ones, which sequence parallelism needs.
    """
    config, kept = plan.config, list[Step]()
    student, teacher = ((own, replace(own, tensor_parallel=2, pipeline_parallel=1)) for own in _own_layouts(config))
    layouts = list(product(student, teacher))

    def possible(step: Step, layouts: Layouts) -> bool:
        changed = _changed(config, [*kept, step], layouts)
        planned = plan_candidate(plan, changed) if changed != _changed(config, kept, layouts) else None
        return planned is not None and not planned.server_shortage

    for step in _steps(plan):
        if step is None or any(possible(step, each) for each in layouts):
            kept.append(step)
    return kept


def _more_nodes(config: RunConfig) -> list[list[Saving]]:
    """More nodes for the trainer and for a dedicated teacher, fewest GPUs first."""
    train, teacher = config.train, config.teacher
    more: list[list[Saving]] = [
        [("train.nodes", train.nodes * more), ("teacher.nodes", teacher.nodes * of_teacher)]
        for more, of_teacher in product(MORE_NODES, MORE_NODES if teacher.nodes else (1,))
    ]
    return sorted(more, key=lambda nodes: total_gpus(_with(config, nodes)))


def _costs(plan: Plan, config: RunConfig) -> dict[Layouts, tuple[int, int]]:
    """The present layouts and others, with what they cost: fields that change, bytes that ranks send for a token.

    Tensor-parallel groups stay within a node and fill it.
    """
    train, (student, teacher) = config.train, _own_layouts(config)
    students = _layout_costs(plan.student, student, train.world_size, train.ranks_per_node, trained=True)
    teachers = {teacher: (0, 0)}
    if plan.teacher:
        per_node = config.teacher.ranks_per_node if config.teacher_is_dedicated else train.ranks_per_node
        teachers = _layout_costs(plan.teacher, teacher, config.teacher_world_size, per_node, trained=False)
    return {
        (first, second): (changed + more_changed, sent + more_sent)
        for (first, (changed, sent)), (second, (more_changed, more_sent)) in product(students.items(), teachers.items())
    }


def _layout_costs(
    model: Model, own: LayoutConfig, world_size: int, ranks_per_node: int, *, trained: bool
) -> dict[LayoutConfig, tuple[int, int]]:
    costs = {}
    for layout in _dividing(model.spec, own, world_size, ranks_per_node):
        layout = replace(layout, sequence_parallel=own.sequence_parallel and layout.tensor_parallel > 1)
        sent = sent_bytes(replace(model, layout=layout), trained=trained)
        costs[layout] = len(list(differences(own, layout))), sum(sent.values())
    return costs


def _dividing(spec: ModelSpec, own: LayoutConfig, world_size: int, ranks_per_node: int) -> list[LayoutConfig]:
    """The present layout of a model, and others that divide it and the ranks.

    Virtual stages and layers of the outer stages are kept where the new number of stages allows it. How experts are
    split is kept.
    """
    found = {own: None}
    experts = {own.expert_parallel, *(SIZES if spec.num_experts else ())}
    for tensor, pipeline, context in product(SIZES, SIZES, SIZES):
        if ranks_per_node % tensor or world_size % (tensor * pipeline * context):
            continue
        layout = replace(own, tensor_parallel=tensor, pipeline_parallel=pipeline, context_parallel=context)
        if context == 1:
            layout = replace(layout, cp_comm_type="p2p")
        if not _divides(spec, layout) or (layout.pipeline_parallel == 1 and own.pipeline_parallel > 1):
            layout = replace(layout, virtual_pipeline=1, first_stage_layers=0, last_stage_layers=0)
        for size in experts:
            layout = replace(layout, expert_parallel=size)
            of_expert = size * layout.experts_tensor_parallel
            if world_size // pipeline % of_expert == 0 and _divides(spec, layout):
                found[layout] = None
    return list(found)


def _divides(spec: ModelSpec, layout: LayoutConfig) -> bool:
    try:
        check_layout(spec, layout)
    except ConfigError:
        return False
    return True


def _own_layouts(config: RunConfig) -> Layouts:
    return config.student.layout, config.teacher.layout


def _changed(config: RunConfig, steps: Iterable[Step], layouts: Layouts) -> RunConfig:
    """The configuration in other layouts. Sequence parallelism stays if there is a tensor-parallel group."""
    config = _with(config, filter(None, steps))
    for role, layout in zip(("student", "teacher"), layouts, strict=True):
        shared = getattr(config, role).layout.sequence_parallel and layout.tensor_parallel > 1
        config = _with(config, [(f"{role}.layout", replace(layout, sequence_parallel=shared))])
    return config


def plan_candidate(plan: Plan, config: RunConfig) -> Plan | None:
    """The plan of a candidate; None if it is invalid."""
    try:
        validate(config)
        return plan_models(config, plan.student.spec, plan.teacher.spec if plan.teacher else None)
    except ConfigError:  # conflicting options, or a layout that does not divide the model
        return None


def _with(tree: Any, savings: Iterable[Saving]) -> Any:
    """The configuration with each field set."""
    for name, value in savings:
        head, _, rest = name.partition(".")
        inner = _with(getattr(tree, head), [(rest, value)]) if rest else value
        tree = replace(tree, **{head: inner})
    return tree


def differences(before: Any, after: Any, prefix: str = "") -> Iterator[str]:
    for field in fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if is_dataclass(old):
            yield from differences(old, new, f"{prefix}{field.name}.")
        elif old != new:
            yield f"{prefix}{field.name}={str(new).lower() if isinstance(new, bool) else new}"
