"""What a vLLM worker spends in the parts of a weight update, for `weight_sync.py`."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from rlad_megatron.servers.transfer import worker

SPENT = {"update": 0.0, "repacking": 0.0, "proof": 0.0}


def timed(name: str, action: Callable) -> Callable:
    def run(*arguments, **named):
        begin = time.perf_counter()
        try:
            return action(*arguments, **named)
        finally:
            SPENT[name] += time.perf_counter() - begin

    return run


for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
    method.process_weights_after_loading = timed("repacking", method.process_weights_after_loading)
worker.wait_for = timed("proof", worker.wait_for)  # fingerprints themselves are taken on a thread meanwhile
for name in ("start_weight_update", "receive_weights", "finish_weight_update"):
    engine = worker.SharedMemoryWeightTransferEngine
    setattr(engine, name, timed("update", getattr(engine, name)))


class TimedWorker(worker.FingerprintRecorder):
    def take_times(self) -> dict[str, float]:
        """Seconds since the last call."""
        found = dict(SPENT)
        SPENT.update(dict.fromkeys(SPENT, 0.0))
        return found
