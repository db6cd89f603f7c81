"""The step of each schedule where servers and trainer have devices of their own: one core each.

    python benchmarks/overlap.py

The demo's models and batch (32 prompts x 8 responses), a vLLM server pinned to one core and the trainer to another, as
on a cluster whose GPUs are divided. Loads: "demo", whose responses end when the student says so; "long tail", whose
groups have lengths from 12 to 240 tokens (log-uniform), the same ones in every step; "slow servers", the long tail with
16 responses in flight in place of 64, so that rollouts take longer than training. Each round runs a block of steps
under every schedule, each time starting from the next one; the first and last step of a block are not timed, because
there `ahead` fills and drains. Weights hardly move (lr 1e-7), so blocks differ only in their prompts. "streaming grpo"
leaves out the teacher. Results go to benchmarks/results/overlap.json and overlap.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import measure
import torch
import torch.distributed as dist
from torch import multiprocessing

from rlad_megatron import platform
from rlad_megatron.config import AHEAD, PHASED, STREAMING, RunConfig, SamplingConfig
from rlad_megatron.config.recipe import load_run
from rlad_megatron.rl_run import RlRun
from rlad_megatron.run import LauncherHooks
from rlad_megatron.servers import stream
from rlad_megatron.servers.process import VllmServer
from rlad_megatron.teacher.client import TeacherAddress

RESULT = Path(__file__).parent / "results" / "overlap.json"
SHORTEST, LONGEST = 12, 240
BLOCK = 4  # steps, of which the middle ones are timed
SCHEDULES = {"phased": PHASED, "streaming": STREAMING, "ahead": AHEAD, "streaming grpo": STREAMING}
# Responses in flight at the server, and the loads that run so, with the ending of their ratios' names.
RUNS = {64: {"demo": "", "long tail": "_long_tail"}, 16: {"slow servers": "_slow_servers"}}
LOADS = {load: suffix for loads in RUNS.values() for load, suffix in loads.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=8777, help="of the rollout server")
    options = parser.parse_args()
    seconds = {}
    for in_flight, loads in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = load_run(
                "kk_tiny_cpu",
                [
                    *[f"runs_dir={folder}", f"rollout.port={options.port}", "train.steps=100000", "optimizer.lr=1e-7"],
                    *["train.ranks_per_node=1", "student.layout.tensor_parallel=1", "observe.tensorboard=false"],
                    "train.microbatch_tokens=640",
                    *["rollout.schedule=ahead", "objective.mismatch_correction=truncated_is"],
                    *[f"rollout.sampling.max_tokens={LONGEST}", f"rollout.max_concurrency={in_flight}"],
                    *["eval.teacher=false", "data.reward_workers=1"],
                ],
            )
            queue = multiprocessing.get_context("spawn").SimpleQueue()
            arguments = (config, list(loads), options.repeats, 29_500 + os.getpid() % 1000, queue)
            multiprocessing.start_processes(_rank, args=arguments, nprocs=1, start_method="spawn")
            seconds |= queue.get()
    ratios = {}
    for load, suffix in LOADS.items():
        for name in ("streaming", "ahead"):
            ratio = measure.median_ratio(seconds[load][name], seconds[load]["phased"])
            ratios[f"{name}_over_phased{suffix}"] = round(ratio, 3)
    # Where rollouts are the longer half: elsewhere the teacher's time cannot hide behind them.
    slow = seconds["slow servers"]
    ratios["rlad_over_grpo_streaming"] = round(measure.median_ratio(slow["streaming"], slow["streaming grpo"]), 3)
    result = {
        "ratios": ratios,
        "rounds": seconds,
    }
    measure.write_result(RESULT, result)
    plot(seconds)
    print(json.dumps(ratios, indent=2))


def plot(seconds: dict[str, dict[str, list[float]]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LOADS), figsize=(12, 3), sharey=True, layout="constrained")
    for axis, load in zip(axes, LOADS, strict=True):
        medians = [statistics.median(times) for times in seconds[load].values()]
        bars = axis.barh(list(seconds[load]), medians, color=["#888888", "#4477aa", "#228833", "#ccbb44"])
        axis.bar_label(bars, fmt="%.1f s", padding=3)
        axis.set(title=load, xlabel="seconds per step", xlim=(0, max(medians) * 1.2))
        axis.invert_yaxis()
    figure.savefig(RESULT.with_suffix(".png"), dpi=120)


@contextmanager
def _lengths(load: str, groups: int) -> Iterator[None]:
    """On rank 0: except under the demo's load, the groups of a step have fixed lengths, the same in every step."""
    original = stream.sampling_body
    shares = [(index + 0.5) / groups for index in range(groups)]
    random.Random(0).shuffle(shares)
    lengths = itertools.cycle(round(SHORTEST * (LONGEST / SHORTEST) ** share) for share in shares)

    def body(tokens: Sequence[int], sampling: SamplingConfig, seeds: Sequence[int], eos_ids: Sequence[int]) -> Any:
        return original(tokens, replace(sampling, max_tokens=next(lengths)), seeds, ())

    if load != "demo":
        stream.sampling_body = body
    yield
    stream.sampling_body = original


def _start_on(core: int, home: int) -> None:
    """Servers start on `core`; everything else stays on `home`."""
    start = VllmServer.start

    def pinned(server: VllmServer) -> None:
        os.sched_setaffinity(0, {core})
        start(server)
        os.sched_setaffinity(0, {home})

    VllmServer.start = pinned


def _no_teacher() -> TeacherAddress:
    raise RuntimeError("the demo's teacher is on the trainer's ranks")


def _block(run: RlRun, schedule: str, *, teacher: bool) -> dict[str, float]:
    """Median seconds of the block's timed steps, and of their phases."""
    from rlad_megatron.loop import train_step

    config, kept = run.config, run.teacher
    objective = config.objective if teacher else replace(config.objective, name="grpo")
    rollout = replace(config.rollout, schedule=schedule)
    train = replace(config.train, steps=run.step + BLOCK)  # nothing is begun beyond the block
    run.config = replace(config, rollout=rollout, objective=objective, train=train)
    run.actor.config, run.teacher = run.config, kept if teacher else None
    times = []
    for _ in range(BLOCK):
        run.step += 1
        with run.timers("step"):
            train_step(run)
        times.append(run.timers.pop())
    run.config, run.actor.config, run.teacher = config, config, kept
    return {name.removeprefix("time/"): statistics.median(step[name] for step in times[1:-1]) for name in times[1]}


def _rank(rank: int, config: RunConfig, loads: list[str], repeats: int, port: int, queue) -> None:
    home, core = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {home})
    _start_on(core, home)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    platform.setup()
    torch.set_num_threads(1)
    platform.init_process_group(600)
    from rlad_megatron.run_prompts import read_prompts
    from rlad_megatron.setup import open_run

    seconds: dict[str, dict[str, list[float]]] = {load: {name: [] for name in SCHEDULES} for load in loads}
    with open_run(config, LauncherHooks(find_teacher=_no_teacher), read_prompts(config)) as run:
        names = list(SCHEDULES)
        for round_ in range(repeats):
            first = round_ % len(names)
            for load in loads:
                for name in names[first:] + names[:first]:
                    with _lengths(load, config.rollout.prompts_per_step):
                        step = _block(run, SCHEDULES[name], teacher="grpo" not in name)
                    said = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in step.items())
                    print(f"round {round_}: {load}, {name}: {said}", flush=True)
                    seconds[load][name].append(step["step"])
    queue.put(seconds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
