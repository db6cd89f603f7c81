"""Everything that differs between CUDA/NCCL and CPU/gloo.

Call `setup()` once per process, before Megatron-Core is used. Packages above this one call these functions. Only
`trainer/checkpoint.py` uses `torch.cuda` itself, for the state of its random generator.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import socket
import time
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlad_megatron.config import dtypes

# By each of their names: short ("bf16"), long ("bfloat16"), safetensors' ("BF16").
DTYPES = {name: getattr(torch, dtype.name) for dtype in dtypes.DTYPES for name in dtype.names}

ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # environment of processes on one machine


EXPANDABLE_SEGMENTS = "expandable_segments:True"
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def visible_devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them; empty on CPU."""
    if not has_cuda():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def use_device(device: torch.device) -> None:
    """Bind this thread to a device, because a new thread starts on the first one. No-op on CPU."""
    if has_cuda():
        torch.cuda.set_device(device)


def prepare() -> None:
    """Make Megatron-Core importable on this machine without touching a device."""
    # Megatron-Core asserts this for tensor parallelism: communication kernels then start before compute kernels. CUDA
    # reads it once, when it is first asked for anything.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not has_cuda():
        from rlad_megatron.platform.cpu import install

        install()


def setup() -> None:
    """Prepare this process, bind it to its device (LOCAL_RANK) and patch Megatron-Core."""
    prepare()
    if has_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    from rlad_megatron.platform import megatron_versions  # imports Megatron-Core, which needs its device

    megatron_versions.patch()


def init_process_group(timeout_s: float) -> None:
    """Join the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Its store listens on MASTER_ADDR only; torch's own would listen on all interfaces. On the loopback, so do gloo and
    NCCL.
    """
    backend = "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if address.startswith("127."):
        os.environ |= ON_LOOPBACK
    listener = None
    if rank == 0:
        listener = socket.create_server((address, port), backlog=world_size).detach()
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, world_size, rank == 0, timeout, master_listen_fd=listener)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def megatron_config_overrides() -> dict[str, object]:
    """Fields of TransformerConfig that depend on the hardware: fused CUDA kernels are off on CPU."""
    fused = has_cuda()
    apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return {
        "use_cpu_initialization": not fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        # Of Megatron's own linear layers; models/build.py fuses Transformer Engine's, which need no apex.
        "gradient_accumulation_fusion": fused and apex,
        "persist_layer_norm": False,
    }


def transformer_engine_version() -> tuple[int, int] | None:
    """(major, minor) of Transformer Engine; None if it is not installed."""
    try:
        major, minor = metadata.version("transformer-engine").split(".")[:2]
    except metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


def capability() -> tuple[int, int] | None:
    """Compute capability of this rank's GPU; None on CPU."""
    return torch.cuda.get_device_capability() if has_cuda() else None


def cuda_version() -> tuple[int, int] | None:
    """(major, minor) of the CUDA that torch was built for; None for its CPU build."""
    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)


def use_expandable_segments() -> None:
    """Have this process's device memory in segments that grow, unless its environment sets the allocator already.

    Micro-batches differ in length, and blocks of changing sizes would leave gaps that no later one fits. Call this
    before the first allocation on a device. Another process cannot open such memory by CUDA IPC.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = EXPANDABLE_SEGMENTS


def loaded_cudnn() -> list[str]:
    """The cuDNN libraries that this process has loaded (Linux). More than one: their parts do not fit each other."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in maps if "/libcudnn.so" in line})


def synchronize() -> None:
    """Wait for the device's queued work. No-op on CPU."""
    if has_cuda():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Free cached device memory so that other processes can use it. No-op on CPU."""
    if has_cuda():
        torch.cuda.empty_cache()


def peak_memory_gb() -> float:
    """This rank's peak memory in GB (1e9 bytes): device memory on CUDA, resident memory of the process on CPU."""
    if has_cuda():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def held_memory_gb() -> float | None:
    """Device memory in use by this rank's tensors, in GB (1e9 bytes); None on CPU."""
    return torch.cuda.memory_allocated() / 1e9 if has_cuda() else None


def cores_of_rank(ranks_on_host: int) -> int:
    """The CPU cores that a rank may use: its share of those that this host's ranks are bound to; at least one.

    A limit of CPU time (`docker --cpus`) is not seen.
    """
    bound = len(os.sched_getaffinity(0))
    # srun can bind each rank to cores of its own. Otherwise all ranks are bound to the same.
    together = int(os.environ.get("SLURM_CPUS_ON_NODE", bound))
    return max(1, min(bound, together // ranks_on_host))


def device_name() -> str:
    """The name of this rank's GPU, for example "NVIDIA H200"; empty on CPU."""
    return torch.cuda.get_device_name() if has_cuda() else ""


def product_rate(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of products of two matrices of `size` rows and columns on this rank's device: the best of several runs."""
    generator = torch.Generator().manual_seed(0)  # a run's own random numbers stay as they are
    left, right = (torch.randn(size, size, generator=generator).to(device(), dtype) for _ in range(2))
    out, best = torch.empty_like(left), float("inf")
    repeats = 10 if has_cuda() else 1
    for _ in range(5):
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right, out=out)
        synchronize()
        best = min(best, (time.perf_counter() - begin) / repeats)
    return 2 * size**3 / best


class Stopwatch:
    """Adds up the time that work takes on this rank's device between `start` and `stop`, without waiting for it."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []  # CUDA events, or seconds on CPU
        self._begun: Any = None

    def start(self) -> None:
        self._begun = self._now()

    def stop(self) -> None:
        """No-op if it does not run."""
        if self._begun is not None:
            self._spans.append((self._begun, self._now()))
            self._begun = None

    def pop(self) -> float:
        """Seconds since the last pop. Waits for the device."""
        synchronize()
        spans, self._spans = self._spans, []
        return sum(begin.elapsed_time(end) / 1e3 if has_cuda() else end - begin for begin, end in spans)

    @staticmethod
    def _now() -> Any:
        if not has_cuda():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
