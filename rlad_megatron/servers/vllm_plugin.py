"""vLLM's entry points: our weight-transfer backends, and the platform of our servers on CPUs.

vLLM calls them in each of its processes. Only names are given; vLLM imports what they name where it is used.
"""

from __future__ import annotations

import functools
import os

FORK_ENGINE = "RLAD_FORK_ENGINE"  # in the environment of a server on CPUs


@functools.cache  # vLLM may call it twice in a process, and refuses a name that it knows
def register() -> None:
    """For the group `vllm.general_plugins`: registers the backends."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from rlad_megatron.servers.transfer.choice import COLLECTIVE, SHARED_MEMORY

    for name, engine in (
        (SHARED_MEMORY, "SharedMemoryWeightTransferEngine"),
        (COLLECTIVE, "CollectiveWeightTransferEngine"),
    ):
        WeightTransferEngineFactory.register_engine(name, "rlad_megatron.servers.transfer.worker", engine)


def platform() -> str | None:
    """For the group `vllm.platform_plugins`: returns the name of a class, or None where vLLM's own is right."""
    from vllm.platforms import cpu_platform_plugin

    if FORK_ENGINE not in os.environ:
        return None
    if cpu_platform_plugin() != "vllm.platforms.cpu.CpuPlatform":
        return None
    return "rlad_megatron.servers.forked_engine.ForkedEngineCpuPlatform"
