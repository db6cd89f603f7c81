"""Weight transfer between CUDA devices: vLLM's own trainer engines, over our source.

An engine of vLLM iterates the source and sends to one server's workers. Here it sends to all servers in one pass, and
never stops half-way: an iteration of the source is a collective, in which the other ranks would wait.

vLLM is imported where it is used: that costs a rank 6 s and 0.5 GB, and the other transports need nothing of it.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from rlad_megatron import platform
from rlad_megatron.errors import WeightSyncError
from rlad_megatron.models.gathered import MegatronWeightSource, TensorMetadata
from rlad_megatron.parallel.collective import is_first_rank, on_first_rank
from rlad_megatron.servers.client import ServerClient, for_each_server
from rlad_megatron.servers.fleet import UNPUSHED

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

T = TypeVar("T")

# Of the buffers in which tensors travel. vLLM's default of 1 GiB is much beside a trainer's optimizer.
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


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def within(timeout_s: float, action: Callable[[], T], give_up: Callable[[], object]) -> T:
    """The result of `action`, which may wait for a peer without end; TimeoutError after `timeout_s`.

    give_up: asked again and again; TimeoutError as soon as it says so.
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
    """Several servers as one, to an engine of vLLM: its client, and with `communicators` its NCCL group too.

    What fails is kept until `raise_errors`, and a server that has failed is left out from then on. Its communicator is
    ended at once, because a broadcast to a worker that will not come lasts for ever.
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
        assert isinstance(update_info, dict)  # a list is of an engine that we do not use
        self._each(lambda client: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """vLLM's engines know no version; ours is set."""
        self._each(lambda client: client.finish_weight_update(weight_version or str(self._version)))

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Send a tensor to the workers of each server in turn, on the same stream."""
        for index, communicator in list(self._communicators.items()):
            try:
                communicator.broadcast(tensor, src=src, stream=stream)
            except Exception as error:  # of NCCL, or of what an ended communicator leaves behind
                self._fail(index, error)

    def raise_errors(self) -> None:
        """Raise the first server's error, as a WeightSyncError."""
        for client in self._clients:
            error = self.errors.get(client.index)
            if isinstance(error, WeightSyncError):
                raise error
            if error is not None:
                raise WeightSyncError(f"{client.name} did not receive the weights: {error!r}; see its log") from error

    def _each(self, action: Callable[[ServerClient], None]) -> None:
        def attempt(client: ServerClient) -> None:
            try:
                action(client)
            except Exception as error:  # every kind: the ranks are in the middle of a collective
                self._fail(client.index, error)

        for_each_server(attempt, [client for client in self._clients if client.index not in self.errors])

    def _fail(self, index: int, error: Exception) -> None:
        with self._lock:
            self.errors.setdefault(index, error)
            communicator = self._communicators.pop(index, None)  # no broadcast begins from here on
        if communicator is not None:
            communicator.destroy()  # ends the one that waits


def _for_vllm(source: MegatronWeightSource) -> WeightSource:
    """It has what the engines call of a `WeightSource`, and does not inherit from it (`source.py`)."""
    return cast("WeightSource", source)


class NcclTransfer:
    """For servers on GPUs of their own. The first rank broadcasts; the others help to put the tensors together.

    Each server has a group of its own (the first rank, then its workers), so that a restart concerns it alone.
    """

    def __init__(self, source: MegatronWeightSource) -> None:
        self.source = source
        self._communicators: dict[int, Any] = {}  # by server; on the first rank

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """Give paused servers the source's present weights as `version`. All ranks together.

        Raises WeightSyncError, on every rank, naming the server.
        """
        platform.synchronize()  # vLLM reads the weights on streams of its own
        on_first_rank(lambda: self._join(clients), self.source.group)
        chosen = {client.index for client in clients}
        servers = Servers(clients, version, {i: it for i, it in self._communicators.items() if i in chosen})
        if is_first_rank(self.source.group):
            try:
                self._broadcast(servers)
            finally:
                for index in servers.errors:  # an ended communicator would send nothing, in silence
                    del self._communicators[index]
        else:
            for _ in self.source:
                pass
            platform.synchronize()
        on_first_rank(servers.raise_errors, self.source.group)

    def shutdown(self) -> None:
        """Leave the groups. Safe to call twice."""
        while self._communicators:
            self._communicators.popitem()[1].destroy()

    def _join(self, clients: Sequence[ServerClient]) -> None:
        """Make a group with each server that has none with this trainer, or whose process is new."""
        for client in clients:
            if client.index in self._communicators and client.weight_version() != UNPUSHED:
                continue
            if client.index in self._communicators:
                self._communicators.pop(client.index).destroy()
            client.shutdown_weight_transfer_engine()  # what it may hold of an earlier trainer
            self._communicators[client.index] = self._open_group(client)

    def _open_group(self, client: ServerClient) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address = address_towards(client.url)
        info = NCCLTrainerInitInfo(
            rank=0,
            master_address=address,
            master_port=free_port(address),
            world_size=1 + client.workers(),
            packed_buffer_size_bytes=bucket_bytes(self.source.metadata()),
        )
        server = Servers([client], version=0)
        form = partial(WeightTransferTrainerFactory.trainer_init, info, client=server, source=_for_vllm(self.source))
        try:
            engine = within(client.timeout_s, form, give_up=lambda: bool(server.errors))
        except Exception as error:
            server.raise_errors()  # what the server said is the better reason
            raise WeightSyncError(
                f"{client.name} and the trainer did not form an NCCL group of {info.world_size} at {address}:"
                f"{info.master_port}: {error!r}; see its log and NCCL_SOCKET_IFNAME on both sides, or use "
                "rollout.weight_transfer=shared_memory"
            ) from error
        server.raise_errors()
        communicator = cast("NCCLTrainerWeightTransferEngine", engine).model_update_group
        if communicator.disabled:  # vLLM would go on and send nothing
            raise WeightSyncError(
                "vLLM finds no NCCL library in the trainer's first rank; set VLLM_NCCL_SO_PATH, or use "
                "rollout.weight_transfer=shared_memory"
            )
        return communicator

    def _broadcast(self, servers: Servers) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        engine = NCCLTrainerWeightTransferEngine(
            client=servers,
            source=_for_vllm(self.source),
            packed_buffer_size_bytes=bucket_bytes(self.source.metadata()),
        )
        engine.model_update_group = servers  # type: ignore[assignment]  # `broadcast` is all that is called of it
        engine.send_weights()


class IpcTransfer:
    """For servers on the ranks' own GPUs: each rank puts whole tensors into a buffer that the worker beside it maps.

    Handles go by the GPU's UUID, so it does not matter which server is on which GPU. Nothing has to be kept from one
    transfer to the next: a restarted server needs nothing special.
    """

    def __init__(self, source: MegatronWeightSource) -> None:
        # vLLM's engine gathers the handles over the default group.
        assert source.group in (None, dist.group.WORLD)
        self.source = source

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """As `NcclTransfer.send`."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        platform.synchronize()
        servers = Servers(clients, version)
        info = IPCTrainerInitInfo(
            rank=0 if is_first_rank(self.source.group) else dist.get_rank(self.source.group),
            packed=True,
            packed_buffer_size_bytes=bucket_bytes(self.source.metadata()),
        )
        engine = WeightTransferTrainerFactory.trainer_init(info, client=servers, source=_for_vllm(self.source))
        engine.send_weights()
        on_first_rank(servers.raise_errors, self.source.group)

    def shutdown(self) -> None:
        """Nothing is held."""
