"""Other splits of a run's GPUs between trainer, teacher and servers, and which of them gets most done. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from rlad_megatron.config import RunConfig
from rlad_megatron.config.placement import has_servers, total_nodes
from rlad_megatron.plan.advice import plan_candidate
from rlad_megatron.plan.lengths import Lengths
from rlad_megatron.plan.plan import Plan
from rlad_megatron.plan.rates import Rates
from rlad_megatron.plan.time import StepTime, step_time

MOST = 8  # about how many numbers of nodes or GPUs are tried for each part
RESPONSES = 256  # that are simulated of a step, so that all splits take a few seconds


def splits(config: RunConfig) -> Iterator[RunConfig]:
    """Configurations on the same nodes whose parts have other shares of them; layouts and servers' size are kept.

    With `rollout.nodes` parts have whole nodes, otherwise GPUs of each of the trainer's nodes. A teacher shares the
    trainer's ranks or has dedicated ones; one on nodes of its own next to servers on the trainer's keeps them. None
    where nothing can be split: on CPUs, with servers on the ranks' GPUs or of `rollout.urls`.
    """
    train, rollout, teacher = config.train, config.rollout, config.teacher
    if not train.gpus_per_node or rollout.colocate or not has_servers(config):
        return
    per_node, size = train.gpus_per_node, rollout.tensor_parallel
    whole = total_nodes(config) if rollout.nodes else per_node
    kept = bool(teacher.nodes and not rollout.nodes)
    teachers = _spaced(0, whole - 2) if config.needs_teacher and not kept else [0]
    for ranks, scored in product(_spaced(1, whole - 1), teachers):
        served = whole - ranks - scored
        if served < 1:
            continue
        if rollout.nodes:
            yield replace(
                config,
                train=replace(train, nodes=ranks, ranks_per_node=per_node),
                teacher=replace(teacher, nodes=scored, ranks_per_node=per_node * (scored > 0)),
                rollout=replace(rollout, nodes=served, servers=served * (per_node // size)),
            )
        elif served >= size:
            yield replace(
                config,
                train=replace(train, ranks_per_node=ranks),
                teacher=teacher if kept else replace(teacher, nodes=0, ranks_per_node=scored),
                rollout=replace(rollout, servers=train.nodes * (served // size)),
            )


def _spaced(first: int, last: int) -> list[int]:
    """Numbers from first to last: all, or if they are many the multiples of a power of two."""
    step = 1
    while (last - first) // step > MOST:
        step *= 2
    return [number for number in range(first, last + 1) if number % step == 0]


def best_split(plan: Plan, lengths: Lengths, rates: Rates) -> tuple[RunConfig, StepTime, int] | None:
    """The configuration with most tokens per GPU-hour, its time, and how many that fit were compared; None if one."""
    fitting = {plan.config: plan}
    for config in splits(plan.config):
        candidate = plan_candidate(plan, config)
        if candidate and not candidate.shortage:
            fitting[config] = candidate
    if len(fitting) == 1:
        return None
    timed = {
        config: step_time(candidate, lengths, rates, RESPONSES).tokens_per_hour for config, candidate in fitting.items()
    }
    best = max(timed, key=timed.__getitem__)
    return best, step_time(fitting[best], lengths, rates), len(fitting)
