"""What measuring costs: the entropy in the fused loss, and all metrics of a step of the demo.

    python benchmarks/metrics_cost.py

Entropy: the fused TRRD loss and its gradients with and without the entropy, paired, on one rank: 512 tokens, hidden
size 512, vocabulary 151,936, chunks of 128, in float32 and bf16. "bonus" also adds an entropy bonus, whose gradient
takes another pass over a chunk. Metrics: the demo's steps with a real server; in every step the seconds on rank 0 of
what only measures (reports of micro-batches and their reduction, figures of rollouts, files, TensorBoard) over those of
the step. Results go to benchmarks/results/metrics_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
from torch import multiprocessing

from rlad_megatron import platform, rl_run
from rlad_megatron.config import ObjectiveConfig, RunConfig
from rlad_megatron.config.recipe import load_run
from rlad_megatron.parallel import fused_linear_loss
from rlad_megatron.parallel.linear_head import LinearHead
from rlad_megatron.parallel.loss_memory import padded_vocab_size
from rlad_megatron.run import LauncherHooks, TrainerRun
from rlad_megatron.teacher.client import TeacherAddress
from rlad_megatron.trainer import actor
from rlad_megatron.trainer.loss import token_loss
from rlad_megatron.types import TokenBatch

RESULT = Path(__file__).parent / "results" / "metrics_cost.json"
TOKENS, HIDDEN, VOCAB, CHUNK = 512, 512, 151_936, 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What only measures, by where it is called from. `TrainerRun.log` writes files and TensorBoard.
MEASURES = [
    (actor, "loss_report"),
    (actor, "reduce_reports"),
    (rl_run, "reward_metrics"),
    (rl_run, "write_rollouts"),
    (TrainerRun, "log"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds of the loss")
    parser.add_argument("--steps", type=int, default=9, help="of the demo, after one to warm up")
    parser.add_argument("--port", type=int, default=8777, help="of the rollout server")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ratios, rounds = {}, {}
    for name, dtype in DTYPES.items():
        seconds = measure.paired_seconds(_losses(dtype), options.repeats)
        rounds |= {f"loss {name} {action}": times for action, times in seconds.items()}
        for action in ("with entropy", "with bonus"):
            key = f"{action.replace(' ', '_')}_over_without_{name}"
            ratios[key] = round(measure.median_ratio(seconds[action], seconds["without"]), 4)
    with tempfile.TemporaryDirectory() as folder:
        config = load_run("kk_tiny_cpu", [f"runs_dir={folder}", f"rollout.port={options.port}"])
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        ranks = config.train.ranks_per_node
        arguments = (config, options.steps, 29_500 + os.getpid() % 1000, queue)
        multiprocessing.start_processes(_rank, args=arguments, nprocs=ranks, start_method="spawn")
        rounds |= queue.get()
    shares = [part / whole for part, whole in zip(rounds["metrics"], rounds["step"], strict=True)]
    ratios["metrics_share_of_step"] = round(statistics.median(shares), 5)
    result = {
        "ratios": ratios,
        "rounds": rounds,
    }
    measure.write_result(RESULT, result)
    print(json.dumps({name: statistics.median(times) for name, times in rounds.items()} | ratios, indent=2))


def _losses(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """The loss and its gradients: without the entropy, with it, and with a bonus."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.zeros(padded_vocab_size(VOCAB, 1), HIDDEN, dtype=dtype)
    weight[:VOCAB] = torch.randn(VOCAB, HIDDEN, generator=generator) * HIDDEN**-0.5
    weight.requires_grad_()
    target = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    noise = torch.randn(3, TOKENS, generator=generator)
    batch = TokenBatch(
        torch.full((TOKENS,), 1 / TOKENS), noise[2], teacher_log_probs=noise[1] - 12, old_log_probs=0.1 * noise[0] - 12
    )
    head, main_grad = LinearHead(weight, VOCAB, None, 1.0, CHUNK), torch.zeros_like(weight, dtype=torch.float32)

    def step(entropy_weight: float = 0.0) -> None:
        of_token = token_loss(batch, ObjectiveConfig(), entropy_weight)
        loss, _ = fused_linear_loss.fused_linear_loss(hidden, target, head, of_token, main_grad_VH=main_grad)
        loss.backward()
        hidden.grad = None

    def without() -> None:
        with _replaced(fused_linear_loss, "_chunks", lambda whole: lambda *args, entropy: whole(*args, entropy=False)):
            step()

    return {"without": without, "with entropy": step, "with bonus": lambda: step(0.01)}


@contextmanager
def _replaced(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    whole = getattr(owner, name)
    setattr(owner, name, change(whole))
    yield
    setattr(owner, name, whole)


def _no_teacher() -> TeacherAddress:
    raise RuntimeError("the demo's teacher is on the trainer's ranks")


def _rank(rank: int, config: RunConfig, steps: int, port: int, queue) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.train.ranks_per_node)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    platform.setup()
    torch.set_num_threads(1)
    platform.init_process_group(600)
    from rlad_megatron.loop import train_step
    from rlad_megatron.run_prompts import read_prompts
    from rlad_megatron.setup import open_run

    spent = 0.0

    def timed(whole: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            begin = time.perf_counter()
            try:
                return whole(*args, **kwargs)
            finally:
                spent += time.perf_counter() - begin

        return call

    for owner, name in MEASURES:
        setattr(owner, name, timed(getattr(owner, name)))
    seconds: dict[str, list[float]] = {"step": [], "metrics": []}
    with open_run(config, LauncherHooks(find_teacher=_no_teacher), read_prompts(config)) as opened:
        for number in range(steps + 1):
            spent, begin = 0.0, time.perf_counter()
            opened.step += 1
            with opened.timers("step"):
                metrics = train_step(opened)
            opened.log(metrics | opened.step_times())
            if number:
                seconds["step"].append(time.perf_counter() - begin)
                seconds["metrics"].append(spent)
    if rank == 0:
        queue.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
