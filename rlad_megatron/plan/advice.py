"""The cheapest change of a configuration that makes it fit.

Fewest GPUs first; then fewest fields changed, so that the rest of a recipe stays as it was thought out; then least
communication; then most tokens in a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product

from rlad_megatron.config import LayoutConfig, RunConfig, validate
from rlad_megatron.errors import ConfigError
from rlad_megatron.plan.memory import Model
from rlad_megatron.plan.placement import total_gpus
from rlad_megatron.plan.plan import Plan, plan_models

MORE_NODES = (1, 2, 4, 8)  # times the trainer's nodes
SIZES = (1, 2, 4, 8, 16)  # of tensor and pipeline parallelism
UTILIZATIONS = (0.7, 0.5, 0.4, 0.3, 0.2)  # of colocated servers


def cheapest_change(plan: Plan) -> str:
    """Overrides that make `plan` fit, as the user would type them; empty if no candidate does."""
    trainer = _first_fit(plan, _trainer_candidates(plan), lambda candidate: not candidate.trainer_shortage)
    if trainer is None:
        return ""
    ranks = _first_fit(trainer, _teacher_candidates(trainer.config), lambda candidate: not candidate.teacher_shortage)
    if ranks is None:
        return ""
    all_fit = _first_fit(ranks, _server_candidates(ranks.config), lambda candidate: not candidate.shortage)
    return " ".join(_differences(plan.config, all_fit.config)) if all_fit else ""


def _first_fit(plan: Plan, candidates: Iterable[RunConfig], fits: Callable[[Plan], bool]) -> Plan | None:
    """The cheapest candidate that fits; `plan` itself if it does."""
    if fits(plan):
        return plan

    def cost(config: RunConfig) -> tuple[int, int, int]:  # of equal ones the first, with the most tokens
        return total_gpus(config), len(_differences(plan.config, config)), _communication(config, plan)

    for config in sorted(candidates, key=cost):
        try:
            validate(config)
            candidate = plan_models(config, plan.student.facts, plan.teacher.facts if plan.teacher else None)
        except ConfigError:  # a layout that does not divide the model, or servers without a place
            continue
        if fits(candidate):
            return candidate
    return None


def _trainer_candidates(plan: Plan) -> Iterator[RunConfig]:
    config, train = plan.config, plan.config.train
    layouts = [
        (tensor, pipeline)
        for tensor, pipeline in product(SIZES, SIZES)
        if tensor <= train.ranks_per_node  # its traffic needs the links within a node
    ]
    budgets = [train.microbatch_tokens // divisor for divisor in (1, 2, 4, 8)]
    budgets = [budget for budget in budgets if budget >= plan.longest] or budgets[:1]
    utilizations = [config.rollout.gpu_memory_utilization]
    if config.rollout.colocate:
        utilizations += [share for share in UTILIZATIONS if share < utilizations[0]]
    students = [_recut(config.student.layout, *layout) for layout in layouts]
    teachers = [config.teacher.layout]
    if config.needs_teacher and not config.teacher_apart:
        teachers = [_recut(config.teacher.layout, *layout) for layout in layouts]
    for student, teacher, budget, share, more in product(students, teachers, budgets, utilizations, MORE_NODES):
        if train.world_size * more % student.model_ranks:
            continue
        if not config.teacher_apart and train.world_size * more % teacher.model_ranks:
            continue
        yield replace(
            config,
            student=replace(config.student, layout=student),
            teacher=replace(config.teacher, layout=teacher),
            train=replace(train, microbatch_tokens=budget, nodes=train.nodes * more),
            rollout=replace(config.rollout, gpu_memory_utilization=share),
        )


def _teacher_candidates(config: RunConfig) -> Iterator[RunConfig]:
    """Another layout of the teacher on ranks of its own, over more nodes of its own."""
    teacher = config.teacher
    sizes = [size for size in SIZES if size <= teacher.ranks_per_node]
    for tensor, pipeline, more in product(sizes, SIZES, MORE_NODES if teacher.nodes else (1,)):
        layout = _recut(teacher.layout, tensor, pipeline)
        yield replace(config, teacher=replace(teacher, layout=layout, nodes=teacher.nodes * more))


def _recut(layout: LayoutConfig, tensor: int, pipeline: int) -> LayoutConfig:
    """The layout with other sizes; sequence parallelism stays as it is where there is a group for it."""
    return LayoutConfig(tensor, pipeline, layout.sequence_parallel and tensor > 1)


def _server_candidates(config: RunConfig) -> Iterator[RunConfig]:
    """Servers over more GPUs each, fewer of them."""
    rollout = config.rollout
    for tensor_parallel in SIZES:
        servers = max(1, rollout.servers * rollout.tensor_parallel // tensor_parallel)
        yield replace(config, rollout=replace(rollout, tensor_parallel=tensor_parallel, servers=servers))


def _communication(config: RunConfig, plan: Plan) -> int:
    """Bytes that all ranks together send for each token. Servers count as little as breaks ties: smaller is better."""
    total = _sent(plan.student, config.student.layout, passes=2) + config.rollout.tensor_parallel
    return total + (_sent(plan.teacher, config.teacher.layout, passes=1) if plan.teacher else 0)


def _sent(model: Model, layout: LayoutConfig, *, passes: int) -> int:
    """passes: 1 forward, 2 forward and backward.

    Each layer has two sums over the TP ranks; a ring sends 2 (TP - 1) copies of the token for each. Between pipeline
    stages every TP rank hands over one copy.
    """
    sums = 2 * model.shape.num_layers * 2 * (layout.tensor_parallel - 1)
    handed_over = (layout.pipeline_parallel - 1) * layout.tensor_parallel
    return passes * model.shape.hidden_size * model.element_bytes * (sums + handed_over)


_FIELDS = (
    ("student.layout.tensor_parallel", lambda c: c.student.layout.tensor_parallel),
    ("student.layout.pipeline_parallel", lambda c: c.student.layout.pipeline_parallel),
    ("student.layout.sequence_parallel", lambda c: str(c.student.layout.sequence_parallel).lower()),
    ("teacher.layout.tensor_parallel", lambda c: c.teacher.layout.tensor_parallel),
    ("teacher.layout.pipeline_parallel", lambda c: c.teacher.layout.pipeline_parallel),
    ("teacher.layout.sequence_parallel", lambda c: str(c.teacher.layout.sequence_parallel).lower()),
    ("train.microbatch_tokens", lambda c: c.train.microbatch_tokens),
    ("train.nodes", lambda c: c.train.nodes),
    ("teacher.nodes", lambda c: c.teacher.nodes),
    ("rollout.gpu_memory_utilization", lambda c: c.rollout.gpu_memory_utilization),
    ("rollout.tensor_parallel", lambda c: c.rollout.tensor_parallel),
    ("rollout.servers", lambda c: c.rollout.servers),
)


def _differences(before: RunConfig, after: RunConfig) -> list[str]:
    return [f"{name}={value(after)}" for name, value in _FIELDS if value(after) != value(before)]
