"""`rlad bench`: steps of a run's student and teacher on synthetic rollouts, without servers, prompts and rewards.

Models, packing, loss, optimizer, teacher (also one on dedicated ranks) and the way of the weights to shared memory are
those of a run. Rollouts are of random tokens, so losses mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Column, Table

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.bench import RESULT, WARM_UP
from rlad_megatron.data.synthetic import synthetic_samples
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.observe.bench_result import machine, medians, rounds_of, write_result
from rlad_megatron.observe.rollouts import mean_of_updates
from rlad_megatron.observe.timers import PhaseTimers
from rlad_megatron.parallel.collective import barrier, on_first_rank
from rlad_megatron.parallel.groups import build_groups, seed_everything
from rlad_megatron.perf import Performance, memory_metrics, rank_rate
from rlad_megatron.plan.count import PROMPT_TOKENS
from rlad_megatron.run import DistillRun, LauncherHooks, Wave
from rlad_megatron.servers.pusher import open_transfer
from rlad_megatron.servers.transfer.choice import ON_CPUS, SHARED_MEMORY, choose_transfer
from rlad_megatron.servers.transfer.shared_memory import SharedMemoryTransfer, tensors_of_file
from rlad_megatron.setup import open_distillation
from rlad_megatron.teacher.teacher import build_teacher
from rlad_megatron.types import Sample

PUSHES = 3

# (figure, label, format), in the order of the table.
SHOWN = (
    ("perf/mfu", "trainer, MFU", ".3f"),
    ("trainer/tokens_per_s", "trainer, tokens/s", ",.0f"),
    ("perf/mfu_teacher", "teacher, MFU", ".3f"),
    ("teacher/tokens_per_s", "teacher, tokens/s", ",.0f"),
    ("time/teacher", "teacher, s", ".2f"),
    ("time/old_logprobs", "old log-probs, s", ".2f"),
    ("time/update", "update, s", ".2f"),
    ("time/step", "step without rollouts, s", ".2f"),
    ("perf/tokens_per_s", "step, tokens/s", ",.0f"),
    ("perf/tokens_per_gpu_s", "step, tokens/s on a device", ",.0f"),
    ("tokens/padding_share", "padding, share of positions", ".3f"),
    ("memory/peak_gb", "peak memory of rank 0, GB", ".3f"),
    ("memory/weights_gb", "  student's weights, GB", ".3f"),
    ("memory/gradients_gb", "  its gradients, GB", ".3f"),
    ("memory/optimizer_gb", "  its optimizer, GB", ".3f"),
    ("memory/teacher_gb", "  teacher's weights, GB", ".3f"),
    ("memory/activations_gb", "  above what is always held, GB", ".3f"),
    ("sync/gb_per_s", "weights through shared memory, GB/s", ".2f"),
    ("sync/seconds", "weights through shared memory, s", ".3f"),
)


def bench(config: RunConfig, hooks: LauncherHooks) -> bool:
    """Measure `train.steps` steps after WARM_UP of them; print a table, and write RESULT. Collective."""
    with open_distillation(config, hooks) as run:
        run.begin()
        run.metrics.truncate_after(-1)  # of an earlier measurement
        rounds = []
        while run.step < config.train.steps:
            run.step += 1
            samples = synthetic_rollouts(config, run.actor.spec.vocab_size, run.step)
            with run.whole_step():
                metrics = train_step(run, samples)
            metrics |= run.step_times()
            run.log(metrics)
            tokens = _tokens(samples)
            rates = {"trainer/tokens_per_s": tokens / metrics["time/update"]}
            if "time/teacher" in metrics:
                rates["teacher/tokens_per_s"] = tokens / metrics["time/teacher"]
            rounds.append(metrics | rates | memory_metrics(run.memory()))
        sync = measure_sync(run.actor.weights, config)
        if run.is_first_rank:
            report(config, run.perf.rate, samples, rounds[WARM_UP:], sync, run.console)
    return True


def bench_teacher(config: RunConfig, hooks: LauncherHooks) -> bool:
    """The same for the teacher alone, on its own ranks. Collective over them."""
    groups = build_groups(config.teacher.layout, config.train.distributed_timeout_s)
    seed_everything(config.train.seed, groups)
    spec = read_model_spec(config.teacher.path)
    teacher = build_teacher(config, config.teacher, spec, groups)
    perf = Performance(config, spec, spec, rank_rate(config.teacher.precision))
    timers, rounds = PhaseTimers(platform.synchronize), []
    for step in range(1, config.train.steps + 1):
        samples = synthetic_rollouts(config, spec.vocab_size, step)
        with timers("teacher"):
            teacher.log_probs(samples)
        perf.scored(samples)
        times = timers.pop()
        seconds = times["time/teacher"]
        rates = {"teacher/tokens_per_s": _tokens(samples) / seconds} | perf.pop({}, seconds)
        rounds.append(times | rates | memory_metrics(teacher.memory()))
    if dist.get_rank() == 0:
        report(config, perf.rate, samples, rounds[WARM_UP:], [], Console(highlight=False))
    return True


def synthetic_rollouts(config: RunConfig, vocab_size: int, step: int) -> list[Sample]:
    """A step's samples. Responses of all lengths up to the longest, equally often; prompts of half the longest."""
    rollout, longest = config.rollout, config.rollout.sampling.max_tokens
    count = rollout.prompts_per_step * rollout.group_size if config.generates else config.sft.batch_size
    prompt = max(1, (config.data.max_prompt_tokens or min(longest, PROMPT_TOKENS)) // 2)
    lengths = [(prompt, -(-longest * number // count)) for number in range(1, count + 1)]
    aggregation = config.objective.aggregation
    samples = synthetic_samples(lengths, vocab_size, aggregation=aggregation, seed=config.train.seed + step)
    if config.generates:
        for sample in samples:
            sample.sampler_log_probs = -torch.log(torch.full((sample.response_length,), float(vocab_size)))
            if config.reference is not None:  # scored by no model here
                sample.reference_log_probs = sample.sampler_log_probs
    return samples


def train_step(run: DistillRun, samples: list[Sample]) -> dict[str, float]:
    """The teacher's log-probs and the updates of a step."""
    wave, updates = Wave([], [samples], last=True), run.config.train.updates_per_rollout
    run.add_teacher_log_probs(wave)
    run.train_on(wave)
    metrics = []
    for number in range(updates):
        if updates > 1:
            run.accumulate(samples[number::updates], last=True)
        metrics.append(run.finish_update())
    return mean_of_updates(metrics)


def measure_sync(weights: GatheredWeights, config: RunConfig) -> list[dict[str, float]]:
    """Pushes of the student's weights through shared memory, into a receiver on rank 0. Collective; one host."""
    size, rounds = sum(tensor.nbytes for tensor in weights.metadata()), []
    with open_transfer(config, ON_CPUS, weights, [], config.run_dir) as transfer:
        assert isinstance(transfer, SharedMemoryTransfer)
        for version in range(1, PUSHES + 1):
            barrier(weights.group)
            begin = time.perf_counter()
            transfer.prepare(version, [])
            on_first_rank(partial(_receive, transfer.path, version), weights.group)
            seconds = time.perf_counter() - begin
            rounds.append({"sync/seconds": seconds, "sync/bytes": size, "sync/gb_per_s": size / seconds / 1e9})
    return rounds


def _receive(path: Path, version: int) -> None:
    """Copy each tensor to the device, as a server's loader does."""
    for _, tensor in tensors_of_file(path, version):
        tensor.to(platform.device(), copy=True)
    platform.synchronize()


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(sample.tokens.numel() for sample in samples)


def report(
    config: RunConfig,
    rate: float,
    samples: Sequence[Sample],
    steps: Sequence[Mapping[str, float]],
    sync: Sequence[Mapping[str, float]],
    console: Console,
) -> None:
    """Print the medians, and write them with the raw figures to RESULT in the run folder. rate: as in Performance."""
    lengths = [sample.response_length for sample in samples]
    backend = choose_transfer(config, platform.has_cuda()).backend
    found: dict[str, Any] = {
        "figures": medians(steps) | medians(sync),
        "rounds": rounds_of(steps) | rounds_of(sync),
        "samples": {"count": len(samples), "tokens": _tokens(samples), "longest_response": max(lengths)},
        "weight_transfer": {"measured": SHARED_MEMORY, "of_the_run": backend},
        # MFU is a share of `flops_per_rank`.
        "machine": machine() | {"ranks": dist.get_world_size(), "flops_per_rank": rate},
    }
    write_result(config.run_dir / RESULT, found)
    print_table(found, console)


def print_table(found: Mapping[str, Any], console: Console) -> None:
    samples, machine, figures = found["samples"], found["machine"], found["figures"]
    title = (
        f"{samples['count']} samples, {samples['tokens']:,} tokens, on {machine['ranks']} ranks ({machine['device']})"
    )
    table = Table(Column(), Column(justify="right"), title=title, title_justify="left", show_header=False)
    for name, label, form in SHOWN:
        if name in figures:
            table.add_row(label, f"{figures[name]:{form}}")
    console.print(table)
    backend = found["weight_transfer"]["of_the_run"]
    if "sync/seconds" in figures and backend != SHARED_MEMORY:
        console.print(f"A run of this configuration sends its weights by {backend}, which was not measured.")
