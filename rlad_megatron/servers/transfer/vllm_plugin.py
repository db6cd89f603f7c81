"""vLLM's entry point: makes the `shared_memory` weight-transfer backend known to vLLM.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Only names are
registered; vLLM imports the engine where it is used.
"""

from __future__ import annotations

import functools


@functools.cache  # vLLM may call it more than once in a process, and refuses a name that it knows
def register() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    from rlad_megatron.servers.transfer.choice import SHARED_MEMORY

    WeightTransferEngineFactory.register_engine(
        SHARED_MEMORY, "rlad_megatron.servers.transfer.worker", "SharedMemoryWeightTransferEngine"
    )
    WeightTransferTrainerFactory.register_engine(
        SHARED_MEMORY, "rlad_megatron.servers.transfer.shared_memory", "SharedMemoryTrainerEngine"
    )
