"""How weights travel from the trainer's ranks to the servers, and whether servers that share GPUs sleep.

| backend | between | who moves the bytes |
| --- | --- | --- |
| shared_memory | trainer and servers on one host | `shared_memory.py` |
| collective | any hosts and devices | `collective.py` |
| ipc | the same GPUs (`rollout.colocate`) | `ipc.py`, vLLM's CUDA IPC engine |
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.errors import ConfigError

SHARED_MEMORY = "shared_memory"  # registered by rlad_megatron.servers.vllm_plugin
COLLECTIVE = "collective"  # registered there too
IPC = "ipc"


@dataclass(frozen=True)
class TransferChoice:
    """What a server is started with, and how the fleet pushes weights to it."""

    backend: str
    sleep_level: int  # of servers while the trainer computes; 0: they stay awake


ON_CPUS = TransferChoice(SHARED_MEMORY, sleep_level=0)


def choose_transfer(config: RunConfig, cuda: bool) -> TransferChoice:
    """config: validated. cuda: whether the ranks and servers have CUDA devices."""
    rollout = config.rollout
    on_gpus = cuda and config.train.gpus_per_node > 0
    backend: str = rollout.weight_transfer
    if backend == "auto":
        if on_gpus:
            backend = IPC if rollout.colocate else COLLECTIVE
        else:
            backend = SHARED_MEMORY if _one_host(config) else COLLECTIVE
    return TransferChoice(backend, rollout.sleep_level if on_gpus and rollout.colocate else 0)


def _one_host(config: RunConfig) -> bool:
    """Whether the configuration alone says that trainer and servers share a host."""
    if config.rollout.urls:
        return config.train.nodes == 1 and all(map(_is_loopback, config.rollout.urls))
    return config.train.nodes == 1 and not config.rollout.nodes


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_transfer(config: RunConfig, cuda: bool, environment: Mapping[str, str]) -> None:
    """Raise a ConfigError if this machine cannot do what a valid configuration asks for.

    environment: that of the ranks.
    """
    if config.rollout.weight_transfer == IPC and not cuda:
        raise ConfigError(
            "rollout.weight_transfer=ipc moves weights between CUDA devices, and torch finds none here; use "
            "rollout.weight_transfer=auto"
        )
    if choose_transfer(config, cuda).backend != IPC:
        return
    for name in platform.ALLOCATOR_VARIABLES:
        if re.search(r"(^|,)\s*expandable_segments\s*:\s*True\s*(,|$)", environment.get(name, "")):
            raise ConfigError(
                f"{name}={environment[name]}: a server could open memory of expandable segments only with the right to "
                "trace the trainer's processes (pidfd_getfd), so rollout.colocate=true does not support them; remove "
                "expandable_segments, or use rollout.weight_transfer=shared_memory"
            )
