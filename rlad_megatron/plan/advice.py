"""The cheapest change that makes a configuration fit without changing what the run computes.

Fewest GPUs first, then least slowdown. The search starts with all savings of `_savings` and `_costly_savings` and every
layout of the models; then it drops each saving that the run fits without, the most expensive first, and narrows the
layouts between the two lists. It never suggests options that change what is learned (FP8, moments in bf16);
docs/precision.md has those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import groupby, product
from typing import Any

from rlad_megatron.config import LayoutConfig, RunConfig, validate
from rlad_megatron.config.placement import total_gpus
from rlad_megatron.errors import ConfigError
from rlad_megatron.plan.memory import Model
from rlad_megatron.plan.plan import Plan, plan_models

MORE_NODES = (1, 2, 4, 8)  # factors on the trainer's nodes and on a dedicated teacher's
SIZES = (1, 2, 4, 8, 16)  # of tensor and pipeline parallelism
UTILIZATIONS = (0.9, 0.7, 0.5, 0.4, 0.3, 0.2)  # of a server's GPUs

Saving = tuple[str, object]  # a field and its new value
Cut = tuple[tuple[int, int], tuple[int, int]]  # TP and PP of the student and of the teacher
LAYOUTS: Saving = ("layouts", None)  # the place of the layouts in the order of savings


def cheapest_change(plan: Plan) -> str:
    """Overrides that make `plan` fit, as the user would type them; empty if none do."""
    candidates = []
    for served in _with_room_for_servers(plan):
        cheap = _possible(served, _savings(served))
        candidates.append((served, cheap, _possible(served, _costly_savings(served.config), after=cheap)))
    for nodes in _more_nodes(plan.config):
        for served, cheap, costly in candidates:
            found = _ranks_that_fit(served, _with(served.config, nodes), cheap, costly)
            if found:
                return " ".join(_differences(plan.config, found))
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
            served = _planned(plan, replace(plan.config, rollout=changed))
            if served and not served.server_shortage:
                found.append(served)
                break
    return found if rollout.colocate else found[:1]


def _ranks_that_fit(plan: Plan, config: RunConfig, cheap: list[Saving], costly: list[Saving]) -> RunConfig | None:
    """`config` with the cheapest change for the ranks of trainer and teacher; None if no change fits."""

    def from_first_fit(savings: list[Saving], cuts: list[list[Cut]]) -> list[list[Cut]]:
        # The cuts before it are out: with fewer savings they do not fit either.
        for position, equals in enumerate(cuts):
            fitting = [cut for cut in equals if _fits(plan, _changed(config, savings, cut))]
            if fitting:
                return [fitting, *cuts[position + 1 :]]
        return []

    savings = [*cheap, *costly]
    cuts = from_first_fit(savings, _cuts(plan, config))
    if not cuts:
        return None
    for saving in (*reversed(costly), LAYOUTS, *reversed(cheap)):
        if saving is LAYOUTS:
            cuts = cuts[:1]
            continue
        fewer = [other for other in savings if other != saving]
        enough = from_first_fit(fewer, cuts)
        if enough:
            savings, cuts = fewer, enough
    return _changed(config, savings, cuts[0][0])


def _savings(plan: Plan) -> Iterator[Saving]:
    """Changes that save memory on the same GPUs in the same layout, the least slowdown first."""
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
        if tokens < train.microbatch_tokens:
            yield "train.microbatch_tokens", tokens
    # The weights are copied to the GPU once per step.
    if config.needs_teacher:
        yield "teacher.offload", True
    # The feed-forward part of an update's forward pass runs twice.
    if train.recompute == "none":
        yield "train.recompute", "selective"
    # Fewer concurrent responses.
    for share in UTILIZATIONS:
        if rollout.colocate and share < rollout.gpu_memory_utilization:
            yield "rollout.gpu_memory_utilization", share


def _costly_savings(config: RunConfig) -> Iterator[Saving]:
    """Changes that cost more time than another layout."""
    yield "train.recompute", "full"  # an update's forward pass runs twice
    for share in (0.5, 1.0):  # Adam on the host; the node's ranks share its memory
        if share > config.optimizer.offload:
            yield "optimizer.offload", share


def _possible(plan: Plan, savings: Iterable[Saving], after: Iterable[Saving] = ()) -> list[Saving]:
    """The savings that change something, are valid with the ones before, and leave room for servers.

    Tried in the present layouts and in the smallest tensor-parallel ones, which sequence parallelism needs.
    """
    config, kept, found = plan.config, list(after), []
    layouts = list(product((_sizes(config.student.layout), (2, 1)), (_sizes(config.teacher.layout), (2, 1))))
    for saving in savings:
        for cut in layouts:
            changed = _changed(config, [*kept, saving], cut)
            planned = _planned(plan, changed) if changed != _changed(config, kept, cut) else None
            if planned and not planned.server_shortage:
                kept.append(saving)
                found.append(saving)
                break
    return found


def _more_nodes(config: RunConfig) -> list[list[Saving]]:
    """More nodes for the trainer and for a dedicated teacher, fewest GPUs first."""
    train, teacher = config.train, config.teacher
    more: list[list[Saving]] = [
        [("train.nodes", train.nodes * more), ("teacher.nodes", teacher.nodes * of_teacher)]
        for more, of_teacher in product(MORE_NODES, MORE_NODES if teacher.nodes else (1,))
    ]
    return sorted(more, key=lambda nodes: total_gpus(_with(config, nodes)))


def _cuts(plan: Plan, config: RunConfig) -> list[list[Cut]]:
    """Layouts that divide the ranks, grouped and sorted by the number of changed fields, then by communication."""
    own: Cut = (_sizes(config.student.layout), _sizes(config.teacher.layout))
    sizes = list(product(SIZES, SIZES))
    teacher_ranks = config.teacher.ranks_per_node if config.teacher_is_dedicated else config.train.ranks_per_node
    students = _dividing(sizes, config.train.world_size, config.train.ranks_per_node)
    teachers = _dividing(sizes, config.teacher_world_size, teacher_ranks) if config.needs_teacher else [own[1]]

    def cost(cut: Cut) -> tuple[int, int]:
        changed = _changed(config, [], cut)
        pairs = (config.student.layout, changed.student.layout), (config.teacher.layout, changed.teacher.layout)
        return sum(len(list(_differences(*pair))) for pair in pairs), _communication(changed, plan)

    cuts = sorted(dict.fromkeys([own, *product(students, teachers)]), key=cost)
    return [list(equals) for _, equals in groupby(cuts, key=cost)]


def _dividing(sizes: list[tuple[int, int]], world_size: int, ranks_per_node: int) -> list[tuple[int, int]]:
    # Tensor-parallel traffic needs the links within a node, so groups must fill the node.
    return [
        (tensor, pipeline)
        for tensor, pipeline in sizes
        if ranks_per_node % tensor == 0 and world_size % (tensor * pipeline) == 0
    ]


def _changed(config: RunConfig, savings: Iterable[Saving], cut: Cut) -> RunConfig:
    config, (student, teacher) = _with(config, savings), cut
    return replace(
        config,
        student=replace(config.student, layout=_recut(config.student.layout, *student)),
        teacher=replace(config.teacher, layout=_recut(config.teacher.layout, *teacher)),
    )


def _sizes(layout: LayoutConfig) -> tuple[int, int]:
    return layout.tensor_parallel, layout.pipeline_parallel


def _recut(layout: LayoutConfig, tensor: int, pipeline: int) -> LayoutConfig:
    """The layout with other sizes. Sequence parallelism stays if there is a tensor-parallel group."""
    return LayoutConfig(tensor, pipeline, layout.sequence_parallel and tensor > 1)


def _planned(plan: Plan, config: RunConfig) -> Plan | None:
    """The plan of a candidate; None if it is invalid."""
    try:
        validate(config)
        return plan_models(config, plan.student.spec, plan.teacher.spec if plan.teacher else None)
    except ConfigError:  # conflicting options, or a layout that does not divide the model
        return None


def _fits(plan: Plan, config: RunConfig) -> bool:
    found = _planned(plan, config)
    return found is not None and not found.shortage


def _communication(config: RunConfig, plan: Plan) -> int:
    """Bytes that all ranks together send per token."""
    total = _sent(plan.student, config.student.layout, passes=2)
    return total + (_sent(plan.teacher, config.teacher.layout, passes=1) if plan.teacher else 0)


def _sent(model: Model, layout: LayoutConfig, *, passes: int) -> int:
    """passes: 1 for forward, 2 for forward and backward.

    Each layer has two all-reduces over the TP ranks; a ring sends 2 (TP - 1) copies of the token for each. Between
    pipeline stages every TP rank sends one copy.
    """
    sums = 2 * model.spec.num_layers * 2 * (layout.tensor_parallel - 1)
    handed_over = (layout.pipeline_parallel - 1) * layout.tensor_parallel
    return passes * model.spec.hidden_size * model.element_bytes * (sums + handed_over)


def _with(tree: Any, savings: Iterable[Saving]) -> Any:
    """The configuration with each field set."""
    for name, value in savings:
        head, _, rest = name.partition(".")
        inner = _with(getattr(tree, head), [(rest, value)]) if rest else value
        tree = replace(tree, **{head: inner})
    return tree


def _differences(before: Any, after: Any, prefix: str = "") -> Iterator[str]:
    for field in fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if is_dataclass(old):
            yield from _differences(old, new, f"{prefix}{field.name}.")
        elif old != new:
            yield f"{prefix}{field.name}={str(new).lower() if isinstance(new, bool) else new}"
