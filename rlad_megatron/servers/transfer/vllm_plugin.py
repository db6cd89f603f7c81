"""vLLM's entry point (group `vllm.general_plugins`): registers our weight-transfer backends.

vLLM calls `register` in each of its processes. Only names are registered; vLLM imports the engine where it is used.
"""

from __future__ import annotations

import functools


@functools.cache  # vLLM may call it twice in a process, and refuses a name that it knows
def register() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from rlad_megatron.servers.transfer.choice import COLLECTIVE, SHARED_MEMORY

    for name, engine in (
        (SHARED_MEMORY, "SharedMemoryWeightTransferEngine"),
        (COLLECTIVE, "CollectiveWeightTransferEngine"),
    ):
        WeightTransferEngineFactory.register_engine(name, "rlad_megatron.servers.transfer.worker", engine)
