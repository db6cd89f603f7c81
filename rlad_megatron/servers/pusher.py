"""Pushes of the student's weights to servers, and the proof that they arrived and are used (transfer/proof.py)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.data.samples import sample_to_score
from rlad_megatron.errors import WeightSyncError
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.parallel.collective import barrier, is_first_rank, on_first_rank
from rlad_megatron.servers.client import ServerClient, for_each_server
from rlad_megatron.servers.process import VllmServer
from rlad_megatron.servers.sampling import CANARY_TOKENS, PROBE_TOKENS, decode_greedily, longest_response
from rlad_megatron.servers.transfer.choice import COLLECTIVE, IPC, TransferChoice
from rlad_megatron.servers.transfer.collective import CollectiveTransfer
from rlad_megatron.servers.transfer.ipc import IpcTransfer
from rlad_megatron.servers.transfer.proof import Agreement, Student, check_canary, check_fingerprints, weakest_canary
from rlad_megatron.servers.transfer.shared_memory import SharedMemoryTransfer, shares_memory
from rlad_megatron.servers.transfer.weights_file import all_files, remove
from rlad_megatron.types import Sample

CANARY = -2  # the version of perturbed weights

Transfer = CollectiveTransfer | IpcTransfer | SharedMemoryTransfer


class WeightPusher:
    """Methods are collective over the student's ranks, and raise the same error on all of them."""

    def __init__(
        self,
        config: RunConfig,
        student: Student,
        probe: Sequence[Sequence[int]],
        *,
        transfer: Transfer,
        sleep_level: int,
        agreement: Agreement,
    ) -> None:
        """probe: prompts to decode. sleep_level: of servers between pushes, as vLLM counts."""
        self.transfer, self.agreement = transfer, agreement
        self._student, self._probe = student, probe
        self._group = student.weights.group
        self._sleep_level = sleep_level
        self._canary_tokens = min(CANARY_TOKENS, longest_response(config))

    def send(self, servers: Sequence[VllmServer], version: int) -> dict[str, float]:
        """Give servers the present weights as `version`; returns metrics `sync/...`.

        Raises WeightSyncError or RolloutError naming the server; servers are then left paused.
        """
        begin = time.perf_counter()
        clients, weights = [server.client for server in servers], self._student.weights
        sent = weights.fingerprints()
        self.transfer.prepare(version, clients)
        paused = time.perf_counter()
        on_first_rank(lambda: for_each_server(self._begin_update, clients), self._group)
        self.transfer.send(version, clients)
        if self._sleep_level:
            release_cached_memory(self._group)
        on_first_rank(lambda: for_each_server(partial(self._end_update, version, sent), clients), self._group)
        seconds, size = time.perf_counter() - begin, sum(tensor.nbytes for tensor in weights.metadata())
        return {
            "sync/seconds": seconds,
            "sync/pause_seconds": time.perf_counter() - paused,
            "sync/bytes": size,
            "sync/gb_per_s": size / seconds / 1e9,
        }

    def prove(self, servers: Sequence[VllmServer], version: int) -> None:
        """Give servers perturbed weights and check that they decode with them. They hold those afterwards.

        version: of the present weights. Raises WeightSyncError naming the server.
        """
        clients = [server.client for server in servers]
        if on_first_rank(lambda: any(for_each_server(lambda client: client.paused(), clients)), self._group):
            # An earlier run's push failed, and left external servers unable to decode.
            self.send(servers, version)
        first, _ = self._decode_probe(clients[:1], self._canary_tokens)  # with the weights of its start
        with self._student.perturbed(weakest_canary(self._student, first)):
            self.send(servers, CANARY)
            samples, sampler = self._decode_probe(clients, self._canary_tokens)
            perturbed = self._log_probs(samples)
        rows = (sampler, perturbed, self._log_probs(samples))
        by_server = zip(*(row.chunk(len(servers)) for row in rows), strict=True)
        for server, log_probs in zip(servers, by_server, strict=True):
            told = check_canary(*log_probs, float32=self.agreement.float32, server=server.name)
            if not told and is_first_rank(self._group):
                said = f"canary: {server.name} is unproven: perturbed weights hardly move the log-probs"
                print(said, file=sys.stderr)

    def verify(self, servers: Sequence[VllmServer]) -> dict[str, float]:
        """Decode the probe greedily on servers and compare with the student: metrics `sync/...`, gaps in nats.

        Raises WeightSyncError, as `Agreement.check`.
        """
        samples, sampler = self._decode_probe([server.client for server in servers], PROBE_TOKENS)
        gaps = (sampler - self._log_probs(samples)).abs()
        found = {
            server.name: {"mean": gap_T.mean().item(), "max": gap_T.max().item()}
            for server, gap_T in zip(servers, gaps.chunk(len(servers)), strict=True)
        }
        self.agreement.check("probe", found)
        return {"sync/probe_abs_mean": gaps.mean().item(), "sync/probe_abs_max": gaps.max().item()}

    def _log_probs(self, samples: list[Sample]) -> torch.Tensor:
        """The student's, in one row, at temperature 1, as servers report them for greedy decoding."""
        return torch.cat(self._student.log_probs(samples, temperature=1.0))

    def _decode_probe(self, clients: Sequence[ServerClient], num_tokens: int) -> tuple[list[Sample], torch.Tensor]:
        """What servers decode greedily: a sample for each server and prompt, and all log-probs in one row."""
        answers = on_first_rank(lambda: decode_greedily(clients, self._probe, num_tokens), self._group)
        samples, log_probs = [], []
        for prompt, answer in zip([*self._probe] * len(clients), chain(*answers), strict=True):
            samples.append(sample_to_score(prompt, answer.tokens, answer.experts))
            log_probs += answer.log_probs
        return samples, torch.tensor(log_probs)

    def _begin_update(self, client: ServerClient) -> None:
        if self._sleep_level:
            client.wake_up("weights")  # the cache comes back when the buffers of the transfer are gone
        client.pause()
        client.call_workers("record_fingerprints")

    def _end_update(self, version: int, sent: Mapping[str, int], client: ServerClient) -> None:
        for received in client.call_workers("recorded_fingerprints"):
            check_fingerprints(sent, received, client.name)
        client.reset_prefix_cache()
        if self._sleep_level:
            client.wake_up("kv_cache")
        client.resume()
        held = client.weight_version()
        if held != str(version):
            raise WeightSyncError(f"{client.name} says it holds weights {held!r} after a push of {version}")


@contextmanager
def open_transfer(
    config: RunConfig, choice: TransferChoice, weights: GatheredWeights, urls: Sequence[str], run_dir: Path
) -> Iterator[Transfer]:
    """The chosen transfer to servers at these URLs. Collective. run_dir: for a file of weights.

    Raises WeightSyncError if they are on other hosts than the transfer serves.
    """
    bucket_bytes = int(config.rollout.weight_bucket_mb * 1e6)
    if choice.backend == IPC:
        yield IpcTransfer(weights, bucket_bytes)
    elif choice.backend == COLLECTIVE:
        transfer = CollectiveTransfer(weights, bucket_bytes)
        try:
            yield transfer
        finally:
            transfer.close()
    elif not shares_memory(urls, weights.group):
        raise WeightSyncError(
            f"rollout.weight_transfer={config.rollout.weight_transfer} passes weights in the memory of one host, but "
            "the trainer's ranks and the servers are on several; use rollout.weight_transfer=collective, also for "
            "servers that you start"
        )
    else:
        try:
            yield SharedMemoryTransfer(weights, run_dir)
        finally:
            if is_first_rank(weights.group):
                remove(all_files(run_dir))


def release_cached_memory(group: dist.ProcessGroup | None) -> None:
    """Free cached device memory so that servers on the trainer's GPUs can start or wake up. Collective.

    No rank returns before all have done so: the first one goes on to start servers, or to wake them up.
    """
    platform.empty_cache()
    barrier(group)
