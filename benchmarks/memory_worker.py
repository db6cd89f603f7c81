"""A worker of vLLM that samples from memory: what `rollout_path.py` puts in place of the model."""

from __future__ import annotations

import time

import numpy as np
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

STOPS = 10  # tokens below may end a response
TOKEN_S = 60e-6  # a faster engine would keep the API server from answering: it serves the engine's messages first


class MemoryWorker(CPUWorker):
    """Gives each scheduled request a random token, with a random log-prob. Prefills must not be split."""

    def execute_model(self, scheduler_output) -> ModelRunnerOutput:
        requests = list(scheduler_output.num_scheduled_tokens)
        time.sleep(TOKEN_S * len(requests))
        count, vocabulary = len(requests), self.model_config.get_vocab_size()
        tokens = np.random.randint(STOPS, vocabulary, (count, 1), np.int32)
        log_probs = np.log(np.random.random_sample((count, 1)), dtype=np.float32, casting="same_kind")
        return ModelRunnerOutput(
            req_ids=requests,
            req_id_to_index={request: index for index, request in enumerate(requests)},
            sampled_token_ids=tokens.tolist(),
            logprobs=LogprobsLists(tokens, log_probs, np.ones(count, np.int32), None),
        )
