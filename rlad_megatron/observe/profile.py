"""Profiles of steps: what ran when on a rank's processor and device, and on CUDA what its memory held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from rlad_megatron.config import ProfileConfig

FOLDER = "profile"  # in the run folder
MEMORY_EVENTS = 100_000  # the newest allocations and releases that a snapshot shows


@contextmanager
def profiled(
    config: ProfileConfig, run_dir: Path, step: int, rank: int, cuda: bool, say: Callable[[str], None]
) -> Iterator[None]:
    """Profile the block if `config` asks for this step on this rank; `say` gets the path of the files.

    Writes `profile/step_<step>_rank_<rank>.json.gz`, which https://ui.perfetto.dev opens, and with cuda
    `..._memory.pickle` for https://pytorch.org/memory_viz. Both also if the block raises.
    """
    if step not in config.steps or (config.ranks and rank not in config.ranks):
        yield
        return
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"step_{step:08d}_rank_{rank}.json.gz"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    try:
        with profile(activities=activities, on_trace_ready=lambda done: done.export_chrome_trace(str(trace))):
            yield
    finally:
        if cuda:
            torch.cuda.memory._dump_snapshot(str(trace).replace(".json.gz", "_memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        say(f"profile of step {step}, rank {rank}: {trace}")
