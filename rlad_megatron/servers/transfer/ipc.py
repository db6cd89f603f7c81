"""Weight transfer into servers on the ranks' own GPUs: vLLM's CUDA IPC engine, over our weights.

vLLM's engine iterates the weights and sends them to one server's workers. Here it sends to all servers in one pass, and
never stops half-way: iterating the weights is a collective, in which the other ranks would wait.

vLLM is imported where it is used: the import costs a rank 6 s and 0.5 GB, and the other transports do not need it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from rlad_megatron import platform
from rlad_megatron.errors import RladError, WeightSyncError
from rlad_megatron.models.gathered import GatheredWeights, TensorMetadata
from rlad_megatron.parallel.collective import is_first_rank, on_first_rank
from rlad_megatron.servers.client import ServerClient, for_each_server


def buffer_bytes(tensors: Sequence[TensorMetadata], bucket_bytes: int) -> int:
    """Size of the engine's buffer: no smaller than the largest tensor, because it does not divide one."""
    return max([bucket_bytes, *(tensor.nbytes for tensor in tensors)])


class Servers:
    """Several servers as one client to a vLLM engine.

    Errors are kept until `raise_errors`. A server that fails is left out from then on.
    """

    def __init__(self, clients: Sequence[ServerClient], version: int) -> None:
        self.errors: dict[int, Exception] = {}  # by server
        self._clients = list(clients)
        self._version = version
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
                with self._lock:
                    self.errors.setdefault(client.index, error)

        for_each_server(attempt, [client for client in self._clients if client.index not in self.errors])


class IpcTransfer:
    """For servers on the ranks' GPUs: each rank puts whole tensors into a buffer that the worker on its GPU maps.

    Handles go by the GPU's UUID, so it does not matter which server is on which GPU. Nothing is kept between transfers,
    so a restarted server needs no special care.
    """

    def __init__(self, weights: GatheredWeights, bucket_bytes: int) -> None:
        # vLLM's engine gathers the handles over the default group.
        assert weights.group in (None, dist.group.WORLD)
        self.weights: Any = weights  # it has what vLLM's engines read of a `WeightSource`
        self._buffer_bytes = buffer_bytes(weights.metadata(), bucket_bytes)

    def prepare(self, version: int, clients: Sequence[ServerClient]) -> None:
        """Nothing: until colocated servers are awake, their GPUs may have no room."""

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """Give paused servers the present weights as `version`. Collective.

        Raises RolloutError or WeightSyncError, on every rank, naming the server.
        """
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        platform.synchronize()  # vLLM reads the weights on other streams
        servers = Servers(clients, version)
        info = IPCTrainerInitInfo(
            rank=0 if is_first_rank(self.weights.group) else dist.get_rank(self.weights.group),
            packed=True,
            packed_buffer_size_bytes=self._buffer_bytes,
        )
        WeightTransferTrainerFactory.trainer_init(info, client=servers, source=self.weights).send_weights()
        on_first_rank(servers.raise_errors, self.weights.group)
