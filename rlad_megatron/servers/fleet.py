"""The run's rollout servers, as every rank calls them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from rlad_megatron import platform
from rlad_megatron.config import RunConfig, SamplingConfig
from rlad_megatron.errors import RolloutError, WeightSyncError
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.parallel.collective import barrier, is_first_rank, on_first_rank
from rlad_megatron.servers.client import UNPUSHED, ServerClient, ServerDownError, ServerTimeoutError, for_each_server
from rlad_megatron.servers.process import VllmServer, check_ports, own_server
from rlad_megatron.servers.sampling import (
    PROBE_TOKENS,
    batch_seed,
    decode_greedily,
    request_seed,
    sampling_body,
    send_requests,
)
from rlad_megatron.servers.transfer.choice import IPC, NCCL, ON_CPUS, TransferChoice
from rlad_megatron.servers.transfer.cuda import IpcTransfer, NcclTransfer
from rlad_megatron.servers.transfer.proof import probe_sample, verify_probe
from rlad_megatron.servers.transfer.shared_file import SharedFileTransfer
from rlad_megatron.servers.transfer.shared_memory import SharedMemoryTransfer, shares_memory
from rlad_megatron.servers.transfer.weights_file import possible_files, removed_at_exit
from rlad_megatron.types import Prompt, Rollout, Sample

Transfer = NcclTransfer | IpcTransfer | SharedMemoryTransfer | SharedFileTransfer
Groups = list[list[Rollout] | None]  # by prompt; None: not finished


class ServerFleet:
    """All rollout servers. Its methods are collective: every rank calls them with the same arguments.

    Rank 0 talks to the servers, and owns their processes; an error there is raised on every rank. A context manager:
    entering starts the servers or waits for somebody else's, leaving stops the own ones.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        model_path: str,
        max_model_len: int,
        eos_ids: Sequence[int],
        run_dir: Path,
        devices: Sequence[str] | None = None,
        transfer: TransferChoice = ON_CPUS,
        find_urls: Callable[[], Sequence[str]] | None = None,
        weights: GatheredWeights | None = None,
    ) -> None:
        """
        model_path: the Hugging Face folder that servers load first, which is version 0 of the weights.
        max_model_len: prompt and response tokens together. eos_ids: the tokens that end a response; nothing else does.
        run_dir: for the servers' logs and a file of weights. devices: CUDA_VISIBLE_DEVICES of each own server; None:
        all inherit this process's. transfer: how weights are pushed. find_urls: called on rank 0, waits for servers
        that the launcher has started; default: those of rollout.urls, else own ones. weights: the trainer's, held by
        the ranks that call this together; None for one process whose servers keep the weights of model_path.
        """
        self.config = config.rollout
        self.servers: list[VllmServer] = []  # on every rank; only those of rank 0 may have a process
        self.version = 0  # of the weights that servers must hold
        self._run_seed = config.train.seed
        self._model_path, self._max_model_len, self._eos_ids = model_path, max_model_len, eos_ids
        self._run_dir, self._devices, self._choice = run_dir, devices, transfer
        self._find_urls = find_urls or (lambda: config.rollout.urls)
        self._weights = weights
        self._group = weights.group if weights is not None else None
        self._transfer: Transfer | None = None
        self._stack = ExitStack()

    def __enter__(self) -> ServerFleet:
        """Raises ConfigError (port taken) or RolloutError (a server did not come up; none is left running)."""
        self._release_cached_memory()
        with ExitStack() as stack:  # Ctrl-C too must not leave servers behind
            stack.callback(self._stop)
            urls = on_first_rank(self._start, self._group)
            self.servers = self.servers or self._external(urls)
            if self._weights is not None:
                self._transfer = self._open_transfer(self._weights, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def clients(self) -> list[ServerClient]:
        return [server.client for server in self.servers]

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, *, batch: int
    ) -> list[list[Rollout]]:
        """`group_size` responses to each prompt: [prompts][group_size], on every rank.

        batch: decides the seeds, for example the step; every batch of a run needs its own. A server that dies is
        restarted, gets the current weights, and is asked again for what it owed.
        Raises RolloutError when a server died more than rollout.max_restarts times, holds other weights than those
        pushed last, refuses a request, or does not answer in time.
        """
        self._release_cached_memory()  # a server that is restarted needs its share of the GPU
        seed = batch_seed(self._run_seed, batch)
        groups: Groups = [None] * len(prompts)

        def next_round() -> tuple[list[int], list[list[Rollout]] | None]:
            restarted = self._sample_missing(groups, prompts, group_size, sampling, seed)
            complete = [group for group in groups if group is not None]
            return restarted, complete if len(complete) == len(groups) else None

        while True:  # each round but the last has used up a restart
            restarted, complete = on_first_rank(next_round, self._group)
            if restarted and self._transfer is not None:
                self._send(self._transfer, restarted)
            if complete is not None:
                return complete

    def push(self, version: int) -> None:
        """Give all servers the trainer's present weights as `version`. Restarts dead servers, wakes sleeping ones.

        A file of weights is written only if `version` differs from that of the last push. Raises WeightSyncError or
        RolloutError naming the server; servers are then left paused, because their weights may be half old, half new.
        """
        assert self._transfer is not None, "this fleet has no weights to push"
        self._release_cached_memory()
        on_first_rank(self._restart_dead, self._group)
        self.version = version
        self._send(self._transfer, range(len(self.servers)))

    def verify(self, prompt_tokens: Sequence[int], log_probs: Callable[[list[Sample]], list[torch.Tensor]]) -> float:
        """Decode a prompt greedily on every server and compare with the trainer: the largest difference in nats.

        log_probs: the trainer's, at temperature 1, as servers report them for greedy decoding.
        Raises WeightSyncError beyond rollout.probe_bound.
        """
        decoded = on_first_rank(lambda: decode_greedily(self.clients, prompt_tokens, PROBE_TOKENS), self._group)
        trainer = log_probs([probe_sample(prompt_tokens, answer) for answer in decoded])
        bound = self.config.probe_bound
        return max(
            verify_probe(answer.log_probs, ours.tolist(), bound, server.name)
            for server, answer, ours in zip(self.servers, decoded, trainer, strict=True)
        )

    def sleep(self) -> None:
        """Have servers on the trainer's GPUs free their memory until the next push. No-op for others.

        An own server that fails to is stopped, so that its memory is free; `push` starts it again.
        """
        if self._choice.sleep_level:
            on_first_rank(lambda: for_each_server(self._put_to_sleep, self.servers), self._group)

    def _start(self) -> list[str]:
        """On rank 0. Returns the servers' URLs."""
        urls = self._find_urls()
        if urls:
            self.servers = self._external(urls)
        else:
            check_ports(self.config)
            self.servers = [
                own_server(
                    self.config,
                    index,
                    model_path=self._model_path,
                    max_model_len=self._max_model_len,
                    run_dir=self._run_dir,
                    seed=self._run_seed,
                    devices=self._devices[index] if self._devices else None,
                    transfer=self._choice,
                )
                for index in range(self.config.servers)
            ]
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait_ready()
        return [client.url for client in self.clients]

    def _external(self, urls: Sequence[str]) -> list[VllmServer]:
        return [VllmServer(self.config, index, url) for index, url in enumerate(urls)]

    def _stop(self) -> None:
        for server in self.servers:
            server.stop()

    def _open_transfer(self, weights: GatheredWeights, stack: ExitStack) -> Transfer:
        if self._choice.backend == NCCL:
            return stack.enter_context(closing(NcclTransfer(weights)))
        if self._choice.backend == IPC:
            return IpcTransfer(weights)
        if is_first_rank(self._group):
            stack.enter_context(removed_at_exit(possible_files(self._run_dir)))
        if shares_memory([client.url for client in self.clients], self._group):
            return SharedMemoryTransfer(weights, self._run_dir)
        return SharedFileTransfer(weights, self._run_dir)

    def _sample_missing(
        self,
        groups: Groups,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> list[int]:
        """On rank 0: sample the groups that are missing, and fill in those that come back complete.

        Returns the servers that were restarted, and hold the weights of model_path now.
        """
        restarted = self._check_weights()
        missing = [place for place, group in enumerate(groups) if group is None]
        bodies = {
            (place, member): sampling_body(
                prompts[place].tokens, sampling, request_seed(seed, place, member), self._eos_ids
            )
            for place in missing
            for member in range(group_size)
        }
        ready = [server for server in self.servers if server not in restarted]
        answers, died = send_requests(ready, bodies, self.config.max_concurrency)
        restarted += died
        for server in restarted:
            server.wait_ready()
        for place in missing:
            members = [(place, member) for member in range(group_size)]
            if answers.keys() >= set(members):
                groups[place] = [
                    Rollout(prompts[place], answer.tokens, answer.log_probs, answer.finish_reason, self.version)
                    for answer in map(answers.__getitem__, members)
                ]
        return sorted(server.index for server in restarted)

    def _check_weights(self) -> list[VllmServer]:
        """On rank 0: every server must hold `version`. Returns those that have lost it; dead ones are restarted."""
        lost = []
        for server in self.servers:
            try:
                held = server.client.weight_version()
            except (ServerDownError, ServerTimeoutError) as error:
                server.restart(str(error))
                lost.append(server)
                continue
            if held == UNPUSHED and self.version > 0:  # somebody else restarted it
                lost.append(server)
            elif held != UNPUSHED and held != str(self.version):
                raise RolloutError(f"{server.name} holds weights {held!r}, not {self.version}; push the weights first")
        return lost

    def _restart_dead(self) -> None:
        """On rank 0. A server may have died while the trainer was busy."""
        dead = [server for server in self.servers if not server.alive()]
        for server in dead:
            server.restart("its process is gone")
        for server in dead:
            server.wait_ready()

    def _send(self, transfer: Transfer, indices: Sequence[int]) -> None:
        clients = [self.clients[index] for index in indices]
        on_first_rank(lambda: for_each_server(self._begin_update, clients), self._group)
        transfer.send(self.version, clients)
        if self._choice.sleep_level:
            release_cached_memory(self._group)
        on_first_rank(lambda: for_each_server(self._end_update, clients), self._group)

    def _begin_update(self, client: ServerClient) -> None:
        if self._choice.sleep_level:
            client.wake_up("weights")  # the cache comes back when the buffers of the transfer are gone
        client.pause()

    def _end_update(self, client: ServerClient) -> None:
        client.reset_prefix_cache()
        if self._choice.sleep_level:
            client.wake_up("kv_cache")
        client.resume()
        held = client.weight_version()
        if held != str(self.version):
            raise WeightSyncError(f"{client.name} says it holds weights {held!r} after a push of {self.version}")

    def _put_to_sleep(self, server: VllmServer) -> None:
        if not server.alive():
            return
        try:
            server.client.sleep(self._choice.sleep_level)
        except RolloutError as error:
            if server.launch is None:
                raise
            print(f"{server.name} is stopped: {error}", file=sys.stderr)
            server.stop()

    def _release_cached_memory(self) -> None:
        """Before a server may start or wake up on the trainer's GPUs."""
        if self.config.colocate:
            release_cached_memory(self._group)


def release_cached_memory(group: dist.ProcessGroup | None) -> None:
    """Free cached device memory so that servers can use it. Collective.

    No rank returns before all have done so: the first one goes on to start servers, or to wake them up.
    """
    platform.empty_cache()
    barrier(group)
