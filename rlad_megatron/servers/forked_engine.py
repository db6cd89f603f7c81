"""vLLM's platform for our servers on CPUs: it forks the engine from the API server.

vLLM spawns it: OpenMP reads each worker's cores, and the loader reads LD_PRELOAD, as a process starts. Our servers bind
no cores (VLLM_CPU_OMP_THREADS_BIND=nobind) and preload nothing, and a spawned engine takes some 13 s to import vLLM
again. Before the fork the API server must run nothing parallel, because OpenMP's threads do not survive it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig  # whose import asks for the platform


class ForkedEngineCpuPlatform(CpuPlatform):
    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        super().check_and_update_config(vllm_config)  # sets "spawn"
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
