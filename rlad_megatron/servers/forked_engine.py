"""vLLM's platform for servers on CPUs, whose engine is forked from the API server.

vLLM spawns it, because OpenMP reads the cores that vLLM gives to each worker when it is loaded. Our servers give none
(VLLM_CPU_OMP_THREADS_BIND=nobind), and an engine that is spawned takes some 13 s to import vLLM again.
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
