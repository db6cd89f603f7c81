"""What the proof of weights costs: the demo's push with it and without it, and the demo's step, in the same run.

    python benchmarks/proof.py

A push alone moves the same bytes through the same routes, without fingerprints, and nothing is decoded after it.
`share_of_step` is the median of (push and verify - push alone) over the median of a whole step. The canary is not in
it: a server goes through it once, at its start. Results go to benchmarks/results/proof.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import measure
import torch
import torch.distributed as dist
from torch import multiprocessing

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.recipe import load_run
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.run import LauncherHooks
from rlad_megatron.servers.client import ServerClient
from rlad_megatron.teacher.client import TeacherAddress

RESULT = Path(__file__).parent / "results" / "proof.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--port", type=int, default=8777, help="of the rollout server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_run("kk_tiny_cpu", [f"runs_dir={folder}", f"rollout.port={options.port}"])
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        ranks = config.train.ranks_per_node
        arguments = (config, options.repeats, 29_500 + os.getpid() % 1000, queue)
        multiprocessing.start_processes(_rank, args=arguments, nprocs=ranks, start_method="spawn")
        seconds = queue.get()
    proof = [proven - alone for proven, alone in zip(seconds["push and verify"], seconds["push alone"], strict=True)]
    share = statistics.median(proof) / statistics.median(seconds["step"])
    result = {
        "ratios": {"share_of_step": round(share, 4)},
        "rounds": seconds,
    }
    measure.write_result(RESULT, result)
    print(json.dumps({name: statistics.median(times) for name, times in seconds.items()} | result["ratios"], indent=2))


@contextmanager
def _without_fingerprints() -> Iterator[None]:
    """On every rank: nothing is summed here, and workers are not asked."""
    fingerprints, call_workers = GatheredWeights.fingerprints, ServerClient.call_workers
    GatheredWeights.fingerprints, ServerClient.call_workers = lambda self: {}, lambda self, method: []
    yield
    GatheredWeights.fingerprints, ServerClient.call_workers = fingerprints, call_workers


def _no_teacher() -> TeacherAddress:
    raise RuntimeError("the demo's teacher is on the trainer's ranks")


def _rank(rank: int, config: RunConfig, repeats: int, port: int, queue) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.train.ranks_per_node)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    platform.setup()
    torch.set_num_threads(1)
    platform.init_process_group(600)
    from rlad_megatron.loop import train_step
    from rlad_megatron.run_prompts import read_prompts
    from rlad_megatron.setup import open_run

    with open_run(config, LauncherHooks(find_teacher=_no_teacher), read_prompts(config)) as run:

        def step() -> None:
            run.step += 1
            train_step(run)

        def push() -> None:
            run.version += 1  # an old version would not be written again
            run.push_weights()

        def push_alone() -> None:
            with _without_fingerprints():
                push()

        def push_and_verify() -> None:
            push()
            run.verify_weights()

        actions = {"push alone": push_alone, "push and verify": push_and_verify, "step": step}
        seconds = measure.paired_seconds(actions, repeats)
    if rank == 0:
        queue.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
