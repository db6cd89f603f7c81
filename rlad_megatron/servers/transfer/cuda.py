"""Weight transfer between CUDA devices: vLLM's own trainer engines, over our weights.

A vLLM engine iterates the weights and sends them to one server's workers. Here it sends to all servers in one pass, and
never stops half-way: iterating the weights is a collective, in which the other ranks would wait.

vLLM is imported where it is used: the import costs a rank 6 s and 0.5 GB, and the other transports do not need it.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from rlad_megatron import platform
from rlad_megatron.errors import RladError, WeightSyncError
from rlad_megatron.models.gathered import GatheredWeights, TensorMetadata
from rlad_megatron.parallel.collective import is_first_rank, on_first_rank
from rlad_megatron.parallel.ports import free_port
from rlad_megatron.servers.client import UNPUSHED, ServerClient, for_each_server

T = TypeVar("T")

# Size of the buffers in which tensors travel. vLLM's default of 1 GiB is much next to a trainer's optimizer.
BUCKET_BYTES = 256 * 2**20
POLL_S = 0.2


def bucket_bytes(tensors: Sequence[TensorMetadata]) -> int:
    """Size of a buffer: no smaller than the largest tensor, because the IPC engine does not divide one."""
    return max([BUCKET_BYTES, *(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)])


def address_towards(url: str) -> str:
    """This host's address as the server at `url` sees it: that of the network interface that leads there."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # UDP: nothing is sent
        return probe.getsockname()[0]


def within(timeout_s: float, action: Callable[[], T], give_up: Callable[[], object]) -> T:
    """The result of `action`, which may wait for a peer without end; TimeoutError after `timeout_s`.

    give_up: polled; TimeoutError as soon as it is true.
    """
    result: Future[T] = Future()
    device = platform.device()

    def run() -> None:
        platform.use_device(device)
        try:
            result.set_result(action())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a daemon: left behind, it does not keep the process alive
    deadline = time.monotonic() + timeout_s
    while wait([result], POLL_S).not_done:
        if give_up() or time.monotonic() > deadline:
            raise TimeoutError(f"no answer after {timeout_s:g} s")
    return result.result()


class Servers:
    """Several servers as one to a vLLM engine: its client, and with `communicators` its NCCL group too.

    Errors are kept until `raise_errors`. A server that fails is left out from then on, and its communicator is ended at
    once, because a broadcast to a worker that will not come has no timeout.
    """

    def __init__(
        self, clients: Sequence[ServerClient], version: int, communicators: Mapping[int, Any] | None = None
    ) -> None:
        """communicators: vLLM's `PyNcclCommunicator` with each server's workers, by the server's index."""
        self.errors: dict[int, Exception] = {}  # by server
        self._clients = list(clients)
        self._version = version
        self._communicators = dict(communicators or {})
        self._lock = threading.Lock()  # calls run on threads

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._each(lambda client: client.init_weight_transfer_engine(init_info))

    def start_weight_update(self) -> None:
        self._each(lambda client: client.start_weight_update())

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        assert isinstance(update_info, dict)  # lists come from an engine that we do not use
        self._each(lambda client: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """vLLM's engines pass no version; ours is set."""
        self._each(lambda client: client.finish_weight_update(weight_version or str(self._version)))

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Send a tensor to the workers of each server in turn, on the same stream."""
        for index, communicator in list(self._communicators.items()):
            try:
                communicator.broadcast(tensor, src=src, stream=stream)
            except Exception as error:  # NCCL's, or of an ended communicator
                self._fail(index, error)

    def raise_errors(self) -> None:
        """Raise the first server's error: the client's, or as a WeightSyncError."""
        for client in self._clients:
            error = self.errors.get(client.index)
            if isinstance(error, RladError):
                raise error
            if error is not None:
                raise WeightSyncError(f"{client.name} did not receive the weights: {error!r}; see its log") from error

    def _each(self, action: Callable[[ServerClient], None]) -> None:
        def attempt(client: ServerClient) -> None:
            try:
                action(client)
            except Exception as error:  # of any kind: the ranks are in the middle of a collective
                self._fail(client.index, error)

        for_each_server(attempt, [client for client in self._clients if client.index not in self.errors])

    def _fail(self, index: int, error: Exception) -> None:
        with self._lock:
            self.errors.setdefault(index, error)
            communicator = self._communicators.pop(index, None)  # no broadcast begins from here on
        if communicator is not None:
            communicator.destroy()  # ends the one that waits


class NcclTransfer:
    """For servers on dedicated GPUs. The first rank broadcasts; the others help to gather the tensors.

    There is one group per server (the first rank, then its workers), so that a restart concerns only that server.
    """

    def __init__(self, weights: GatheredWeights) -> None:
        self.weights: Any = weights  # it has what vLLM's engines read of a `WeightSource`
        self._communicators: dict[int, Any] = {}  # by server; on the first rank

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """Give paused servers the present weights as `version`. Collective.

        Raises RolloutError or WeightSyncError, on every rank, naming the server.
        """
        platform.synchronize()  # vLLM reads the weights on other streams
        on_first_rank(lambda: self._join(clients), self.weights.group)
        chosen = {client.index for client in clients}
        servers = Servers(clients, version, {i: it for i, it in self._communicators.items() if i in chosen})
        if is_first_rank(self.weights.group):
            try:
                self._broadcast(servers)
            finally:
                for index in servers.errors:  # an ended communicator would silently send nothing
                    del self._communicators[index]
        else:
            for _ in self.weights:
                pass
            platform.synchronize()
        on_first_rank(servers.raise_errors, self.weights.group)

    def close(self) -> None:
        """Leave the groups. Safe to call twice."""
        while self._communicators:
            self._communicators.popitem()[1].destroy()

    def _join(self, clients: Sequence[ServerClient]) -> None:
        """Form a group with each server that has none with this trainer, or whose process is new."""
        for client in clients:
            if client.index in self._communicators and client.weight_version() != UNPUSHED:
                continue
            if client.index in self._communicators:
                self._communicators.pop(client.index).destroy()
            client.shutdown_weight_transfer_engine()  # an earlier trainer's, if there was one
            self._communicators[client.index] = self._open_group(client)

    def _open_group(self, client: ServerClient) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address = address_towards(client.url)
        info = NCCLTrainerInitInfo(
            rank=0,
            master_address=address,
            master_port=free_port(address, seed=os.getpid()),
            world_size=1 + client.workers(),
            packed_buffer_size_bytes=bucket_bytes(self.weights.metadata()),
        )
        server = Servers([client], version=0)
        form = partial(WeightTransferTrainerFactory.trainer_init, info, client=server, source=self.weights)
        try:
            engine: Any = within(client.timeout_s, form, give_up=lambda: bool(server.errors))
        except Exception as error:
            server.raise_errors()  # the server's own error says more
            raise WeightSyncError(
                f"{client.name} and the trainer did not form an NCCL group of {info.world_size} at {address}:"
                f"{info.master_port}: {error!r}; see its log and NCCL_SOCKET_IFNAME on both sides, or use "
                "rollout.weight_transfer=shared_memory"
            ) from error
        server.raise_errors()
        communicator = engine.model_update_group
        if communicator.disabled:  # vLLM would go on and send nothing
            raise WeightSyncError(
                "vLLM finds no NCCL library in the trainer's first rank; set VLLM_NCCL_SO_PATH, or use "
                "rollout.weight_transfer=shared_memory"
            )
        return communicator

    def _broadcast(self, servers: Servers) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        bucket = bucket_bytes(self.weights.metadata())
        engine: Any = NCCLTrainerWeightTransferEngine(
            client=servers, source=self.weights, packed_buffer_size_bytes=bucket
        )
        engine.model_update_group = servers  # only `broadcast` is called
        engine.send_weights()


class IpcTransfer:
    """For servers on the ranks' GPUs: each rank puts whole tensors into a buffer that the worker on its GPU maps.

    Handles go by the GPU's UUID, so it does not matter which server is on which GPU. Nothing is kept between transfers,
    so a restarted server needs no special care.
    """

    def __init__(self, weights: GatheredWeights) -> None:
        # vLLM's engine gathers the handles over the default group.
        assert weights.group in (None, dist.group.WORLD)
        self.weights: Any = weights  # it has what vLLM's engines read of a `WeightSource`

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """As `NcclTransfer.send`."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        platform.synchronize()
        servers = Servers(clients, version)
        info = IPCTrainerInitInfo(
            rank=0 if is_first_rank(self.weights.group) else dist.get_rank(self.weights.group),
            packed=True,
            packed_buffer_size_bytes=bucket_bytes(self.weights.metadata()),
        )
        WeightTransferTrainerFactory.trainer_init(info, client=servers, source=self.weights).send_weights()
        on_first_rank(servers.raise_errors, self.weights.group)
