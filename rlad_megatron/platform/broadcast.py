"""A process group in which rank 0 sends the same bytes to all others: NCCL on GPUs, gloo on CPUs.

It does not touch torch's default group, so a process can be in any number of them, with peers of other worlds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ContextDecorator
from datetime import timedelta

import torch
import torch.distributed as dist

from rlad_megatron import platform

CHUNK_BYTES = 512 * 1024  # the last of R receivers lags R chunks behind the sender
BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"

Wait = Callable[[], object]  # returns when a transfer is done; PeerLost if it failed


class PeerLost(RuntimeError):
    """A member of the group is gone, or made no progress in time."""


class _PeerErrors(ContextDecorator):
    """Makes torch's errors PeerLost.

    Not by `contextmanager`: in Python 3.12 its frames and the error refer to each other, and keep connections open.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise PeerLost(str(error)) from error


class GlooChain:
    """Every receiver passes chunks on to the next one as they come in.

    gloo's own broadcast is a tree, whose time grows with the number of receivers.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, address: str, timeout_s: float) -> None:
        """address: of this process, as its peers reach it."""
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        # Lazily: only neighbours connect.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address, lazy_init=True)]
        self._previous, self._next = rank - 1, (rank + 1) % size
        self._group = dist.ProcessGroupGloo(store, rank, size, options)
        self._thread = ThreadPoolExecutor(1, "chain")

    @_PeerErrors()
    def transfer(self, data: torch.Tensor) -> Wait:
        chunks = data.split(CHUNK_BYTES)
        # Asked for now, so that they come while the chunks before them are still being passed on.
        incoming = [self._group.recv([chunk], self._previous, 0) for chunk in chunks] if self._previous >= 0 else []
        passed_on = [self._thread.submit(self._pass_on, chunks, incoming)]

        @_PeerErrors()
        def wait() -> None:
            # Popped: an error and the future that holds it would refer to each other, and keep connections open.
            for work in passed_on.pop().result():
                work.wait()

        return wait

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        del self._group  # closes the connections, so that neighbours notice

    def _pass_on(self, chunks: Sequence[torch.Tensor], incoming: Sequence[dist.Work]) -> list[dist.Work]:
        outgoing = []
        for index, chunk in enumerate(chunks):
            if incoming:
                incoming[index].wait()
            if self._next:
                outgoing.append(self._group.send([chunk], self._next, 0))
        return outgoing


class NcclBroadcast:
    """NCCL's broadcast is pipelined already."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        # Read by the constructor: failures are then errors of `wait`. Otherwise torch's watchdog ends the process.
        before = os.environ.get(BLOCKING_WAIT)
        os.environ[BLOCKING_WAIT] = "1"
        try:
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        finally:
            if before is None:
                del os.environ[BLOCKING_WAIT]
            else:
                os.environ[BLOCKING_WAIT] = before

    @_PeerErrors()
    def transfer(self, data: torch.Tensor) -> Wait:
        return _PeerErrors()(self._group.broadcast([data], dist.BroadcastOptions()).wait)  # from rank 0

    def close(self) -> None:
        self._group.abort()


BroadcastGroup = GlooChain | NcclBroadcast


@_PeerErrors()
def open_broadcast_group(store: dist.Store, rank: int, size: int, address: str, timeout_s: float) -> BroadcastGroup:
    """Join a group. Every member calls `transfer` for the same sequence of uint8 sizes; rank 0's data go to all.

    Transfers run in the background, in order. `close` waits for nothing.

    Args:
        store: the same for all members.
        address: of this process, as its peers reach it; on GPUs NCCL chooses its interfaces itself.
        timeout_s: bounds joining, and each wait for a peer.

    Raises:
        PeerLost: a member did not come, or cannot be reached.
    """
    if platform.has_cuda():
        return NcclBroadcast(store, rank, size, timeout_s)
    return GlooChain(store, rank, size, address, timeout_s)
