"""Seconds of a step, phase by phase: operations, bytes and a simulation of who waits for whom. Torch-free, estimated.

FLOPs over what ranks reach, plus sent bytes over links, times the pipeline's bubble; decoding by what a step reads. Not
overlapped: what is sent within a pass adds to it. Measured rates of `rlad bench` hold all of that already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from rlad_megatron.config import AHEAD
from rlad_megatron.config.dtypes import ITEMSIZE
from rlad_megatron.config.placement import total_gpus
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.plan import memory
from rlad_megatron.plan.cost import UPDATE_PASSES, forward_flops, recomputed_share, sent_bytes
from rlad_megatron.plan.devices import Device
from rlad_megatron.plan.lengths import Lengths
from rlad_megatron.plan.memory import Model
from rlad_megatron.plan.plan import Plan
from rlad_megatron.plan.rates import (
    ALL_REDUCE_S,
    DECODE_STEP_S,
    DISK,
    HOST_COPY,
    LINKS,
    MEMORY,
    PREFILL_MFU,
    PUSH_S,
    TRAIN_MFU,
    Rates,
)
from rlad_megatron.plan.simulate import Rounds, TrainerSpeed, simulate
from rlad_megatron.plan.simulated_servers import ServerSpeed

# Bytes of an element that the optimizer's step reads and writes: float32 gradient, master copy and two moments, then
# the last three again.
OPTIMIZER_TRAFFIC = 4 * (4 + 3)
MOST_RESPONSES = 2048  # simulated, which takes about a second
SEED = 0  # of the drawn lengths: a plan is the same each time


@dataclass(frozen=True)
class StepTime:
    """Of a step, on average; named as a run's metrics."""

    times: dict[str, float]  # time/...: seconds; time/checkpoint is a step's share
    idle: dict[str, float]
    tokens: float  # of prompts and responses
    devices: int  # GPUs; on CPUs the trainer's ranks

    @property
    def tokens_per_hour(self) -> float:
        """Of a device."""
        return 3600 * self.tokens / self.times["time/step"] / self.devices


def step_time(plan: Plan, lengths: Lengths, rates: Rates, most_responses: int = MOST_RESPONSES) -> StepTime:
    """Simulate steps of a run that samples. The plan must fit.

    most_responses: of a simulated step. A larger run is simulated as a part of it, with as many prompts for a server,
    each of which stands for several; so a step's longest response is a little shorter.
    """
    config, rollout = plan.config, plan.config.rollout
    rounds = Rounds(
        prompts=rollout.prompts_per_step,
        group_size=rollout.group_size,
        prompt_tokens=lengths.prompt,
        schedule=config.schedule,
        ahead=rollout.ahead if config.schedule == AHEAD else 0,
        overprovision=rollout.overprovision,
        servers=len(rollout.urls) or rollout.servers,
    )
    trainer = trainer_speed(plan, lengths, rates)
    parts = _parts(rounds, most_responses)
    if parts > 1:
        rounds, trainer = _part(rounds, parts), _for_part(trainer, parts)
    drawn = cycle(lengths.draw(32 * (rounds.prompts + rounds.overprovision) * rounds.group_size, SEED))
    found = simulate(
        rounds,
        server_speed(plan, lengths, rates),
        trainer,
        lambda count: [next(drawn) for _ in range(count)],
        lengths.trained,
    )
    saved = checkpoint_seconds(plan) / config.checkpoint.every if config.checkpoint.every else 0.0
    step = found.times["time/step"] + saved
    # While a checkpoint is written, everything else waits.
    whole = found.times["time/step"] / step
    idle = {name: 1 - whole * (1 - value) for name, value in found.idle.items()}
    idle["idle/trainer"] = whole * found.idle["idle/trainer"]
    times = found.times | {"time/checkpoint": saved, "time/step": step}
    return StepTime(times, idle, parts * found.tokens, total_gpus(config) or config.train.world_size)


def _parts(rounds: Rounds, most_responses: int) -> int:
    """Into how many equal parts a step is divided, so that one has about so many responses."""
    common = math.gcd(rounds.prompts, rounds.servers, rounds.overprovision)
    most = max(1, rounds.prompts * rounds.group_size // most_responses)
    return max(parts for parts in range(1, min(most, common) + 1) if common % parts == 0)


def _part(rounds: Rounds, parts: int) -> Rounds:
    return replace(
        rounds,
        prompts=rounds.prompts // parts,
        servers=rounds.servers // parts,
        overprovision=rounds.overprovision // parts,
    )


def _for_part(trainer: TrainerSpeed, parts: int) -> TrainerSpeed:
    """The trainer of the whole, for whom each response stands for as many as there are parts."""
    return replace(
        trainer,
        wave_tokens=trainer.wave_tokens // parts,
        teacher_s=lambda responses: trainer.teacher_s([*responses] * parts),
        score_s=lambda responses: trainer.score_s([*responses] * parts),
        update_s=lambda responses: trainer.update_s([*responses] * parts),
    )


def sample_flops(
    spec: ModelSpec, prompt: float, passes: float = 1, head_passes: int = 0
) -> Callable[[Sequence[int]], float]:
    """The operations of forward passes over samples, and of the head alone, as a function of their responses' lengths.

    `forward_flops` of a sample of n tokens is a n + b n^2 plus the head's, so two counts give it for all lengths.
    """
    one, two = forward_flops(spec, [1], 0), forward_flops(spec, [2], 0)
    square = (two - 2 * one) / 2
    linear, head = passes * (one - square), (passes + head_passes) * forward_flops(spec, [], 1)
    square *= passes

    def flops(responses: Sequence[int]) -> float:
        return sum(linear * (prompt + n) + square * (prompt + n) ** 2 + head * n for n in responses)

    return flops


def bubble(model: Model, microbatches: int) -> float:
    """Seconds in which a pipeline stage waits, over those in which it works.

    (PP - 1) / micro-batches, over the chunks of a stage (arXiv 2104.04473, section 2.2).
    """
    layout = model.layout
    return (layout.pipeline_parallel - 1) / layout.virtual_pipeline / microbatches


def trainer_speed(plan: Plan, lengths: Lengths, rates: Rates) -> TrainerSpeed:
    """What the ranks of trainer and teacher take."""
    config, student = plan.config, plan.student
    train, measured = config.train, rates.measured
    longest = plan.longest or plan.tokens
    again = recomputed_share(student, train, longest)
    # What is computed again or before the loss lowered the measured rate.
    work = UPDATE_PASSES * (1 if measured.update_flops is not None else 1 + again)
    head_passes = int(measured.update_flops is None and config.head_pass_before_loss)
    # For pi_old, where several updates follow, and for a KL to the starting student.
    passes = (train.updates_per_rollout > 1) + (config.reference is not None)
    ranks, rate = train.world_size, measured.update_flops

    score: Callable[[Sequence[int]], float] = _no_pass
    teacher = score
    if passes:
        score = _pass_seconds(plan, student, ranks, lengths, rates, passes, rate, trained=False)
    if plan.teacher is not None:
        scorers = config.teacher_world_size
        teacher = _pass_seconds(plan, plan.teacher, scorers, lengths, rates, 1, measured.teacher_flops, trained=False)
    data_parallel = train.world_size // student.layout.model_ranks
    return TrainerSpeed(
        wave_tokens=data_parallel * student.layout.pipeline_parallel * train.microbatch_tokens,
        teacher_s=teacher,
        score_s=score,
        update_s=_pass_seconds(plan, student, ranks, lengths, rates, work, rate, trained=True, head_passes=head_passes),
        finish_s=0.0 if measured.update_flops is not None else finish_seconds(plan, rates),
        push_s=push_seconds(plan, rates),
        updates=train.updates_per_rollout,
        teacher_apart=config.teacher_is_dedicated,
    )


def _no_pass(responses: Sequence[int]) -> float:
    return 0.0


def _pass_seconds(
    plan: Plan,
    model: Model,
    ranks: int,
    lengths: Lengths,
    rates: Rates,
    work: float,
    measured: float | None,
    *,
    trained: bool,
    head_passes: int = 0,
) -> Callable[[Sequence[int]], float]:
    """Seconds of responses.

    work: in forward passes. head_passes: of the head alone, besides. trained: backward too. measured: a rank's FLOP/s
    in the phase.
    """
    flops, layout = sample_flops(model.spec, lengths.prompt, work, head_passes), model.layout
    copies = ranks // layout.model_ranks
    budget = plan.config.train.microbatch_tokens
    sent, rate = 0.0, measured
    if rate is None:
        assert rates.device is not None  # CPUs have measured rates
        rate = rates.device.bf16_flops * TRAIN_MFU
        apart = model is plan.teacher and plan.config.teacher_is_dedicated
        per_node = plan.config.teacher.ranks_per_node if apart else plan.config.train.ranks_per_node
        sent = sent_seconds(model, ranks, per_node, rates.device, trained=trained) * (1 if trained else work)

    def seconds(responses: Sequence[int]) -> float:
        tokens = sum(responses) + lengths.prompt * len(responses)
        one_copy = flops(responses) / copies
        # A sample is not divided: the copy that has the longest one takes at least its time.
        one_copy = max(one_copy, flops([max(responses)]))
        computed = one_copy / layout.model_ranks / rate
        waiting = 0.0 if measured is not None else bubble(model, max(1, math.ceil(tokens / copies / budget)))
        return computed * (1 + waiting) + tokens / copies * sent

    return seconds


def sent_seconds(model: Model, ranks: int, per_node: int, device: Device, *, trained: bool) -> float:
    """Seconds in which the ranks of one copy send what belongs to a token, if nothing overlaps."""
    layout = model.layout
    inner = layout.tensor_parallel * layout.context_parallel
    span = {
        "TP": layout.tensor_parallel,
        "CP": inner,
        "EP": layout.expert_parallel * layout.experts_tensor_parallel,
        "ETP": layout.experts_tensor_parallel,
        "PP": ranks,
    }
    sent = sent_bytes(model, trained=trained)
    return sum(
        size / layout.model_ranks / (LINKS * (device.nvlink if span[kind] <= per_node else device.network))
        for kind, size in sent.items()
    )


def finish_seconds(plan: Plan, rates: Rates) -> float:
    """Of a step's end: gradients summed over copies, the optimizer's step, new weights gathered. Fullest stage."""
    config, model, device = plan.config, plan.student, rates.device
    assert device is not None  # CPUs have a measured rate of the whole update
    shared = config.train.world_size // model.layout.copy_ranks  # ranks that share out the optimizer's state
    stages = range(model.layout.pipeline_parallel)
    elements = max(memory.buffer_elements(model, stage, shared) for stage in stages)
    optimizer = config.optimizer
    link = device.nvlink if config.train.world_size <= config.train.ranks_per_node else device.network
    # A ring sends each part to all but one. What overlaps with a pass is not counted.
    sent = 4 * (not optimizer.overlap_grad_reduce) + model.element_bytes * (not optimizer.overlap_param_gather)
    update = elements / shared * (OPTIMIZER_TRAFFIC + model.element_bytes) / (MEMORY * device.memory)
    return elements * sent * (shared - 1) / shared / (LINKS * link) + update


def push_seconds(plan: Plan, rates: Rates) -> float:
    """Of a push of the weights to all servers, which are paused for all of it.

    Each GPU of a server gets all weights; a pipelined broadcast takes as long to one as to many.
    """
    config, measured = plan.config, rates.measured
    size = plan.student.total_parameters * plan.student.element_bytes
    if rates.device is None or config.rollout.weight_transfer == "shared_memory":
        seconds = size / HOST_COPY
        if measured.push_s is not None and measured.push_bytes is not None:
            seconds = measured.push_s * size / measured.push_bytes
    else:
        one_node = config.train.nodes == 1 and not config.rollout.nodes
        link = rates.device.nvlink if one_node or config.rollout.colocate else rates.device.network
        seconds = size / (LINKS * link)
    return seconds + PUSH_S


def checkpoint_seconds(plan: Plan) -> float:
    """Of writing weights, master copy and moments, each once, from all of the trainer's nodes."""
    config, model = plan.config, plan.student
    each = model.element_bytes + memory.master_bytes(model, config.optimizer) + 2 * ITEMSIZE[config.optimizer.moments]
    return model.total_parameters * each / (DISK * config.train.nodes)


def server_speed(plan: Plan, lengths: Lengths, rates: Rates) -> ServerSpeed:
    """Of one rollout server. Slots: the average responses that its cache holds, at most rollout.max_concurrency."""
    config, spec = plan.config, plan.student.spec
    rollout, measured, device = config.rollout, rates.measured, rates.device
    kv_tokens = plan.server.kv_tokens if plan.server else 0
    # Without servers of its own the run uses those of rollout.urls, whose cache is not known.
    slots = max(
        1, min(rollout.max_concurrency, int(kv_tokens / (lengths.prompt + lengths.mean)) or rollout.max_concurrency)
    )
    if measured.decode_s:
        prefill = measured.prefill_s or 0.0
        # A server on CPUs reads prompts in steps of their own (servers/process.py), one on GPUs next to its decoding.
        request = measured.request_s or 0.0 if device is None else 0.0
        return ServerSpeed(measured.step_s(slots), 0.0, prefill * lengths.prompt, request, rollout.max_concurrency)
    assert device is not None  # CPUs have measured rates
    size = rollout.tensor_parallel
    reading = MEMORY * device.memory
    rate = size * device.bf16_flops * TRAIN_MFU
    flops = forward_flops(spec, [1], 1)
    sums = 2 * spec.num_layers * ALL_REDUCE_S * (size > 1)
    step_s = tuple(
        max(_read_bytes(plan, number) / reading, number * flops / rate) + sums + DECODE_STEP_S
        for number in range(1, slots + 1)
    )
    context = memory.kv_bytes_per_token(spec, size, rollout.dtype) / reading
    prompt = forward_flops(spec, [max(1, round(lengths.prompt))], 1)
    prefill = prompt / (size * device.bf16_flops * PREFILL_MFU)  # once a group: the others find it in the cache
    return ServerSpeed(step_s, context, prefill, 0.0, rollout.max_concurrency)


def _read_bytes(plan: Plan, responses: int) -> float:
    """Of weights and states that a decode step reads on a GPU of a server. Of experts, those that some token chose."""
    spec, rollout = plan.student.spec, plan.config.rollout
    size = rollout.tensor_parallel
    weights = float(memory.server_weight_bytes(plan.student, size, rollout.dtype))
    element = ITEMSIZE[rollout.dtype]
    if not spec.tied:
        weights -= spec.vocab_size * spec.hidden_size * element // size  # of the embedding, only rows
    if spec.num_experts:
        experts = spec.num_layers * spec.num_experts * 3 * spec.hidden_size * spec.expert_ffn_size * element / size
        weights -= experts * (1 - spec.experts_per_token / spec.num_experts) ** responses
    return weights + responses * memory.state_bytes_per_request(spec, size, rollout.dtype)
