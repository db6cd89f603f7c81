"""Gives the servers the trainer's weights, once per iteration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from rlad_megatron import platform
from rlad_megatron.errors import WeightSyncError
from rlad_megatron.models.gathered import MegatronWeightSource
from rlad_megatron.parallel.collective import barrier, is_first_rank, on_first_rank
from rlad_megatron.servers.client import ServerClient, for_each_server
from rlad_megatron.servers.transfer.choice import IPC, NCCL, ON_CPUS, Transfer
from rlad_megatron.servers.transfer.cuda import IpcTransfer, NcclTransfer
from rlad_megatron.servers.transfer.shared_file import SharedFileTrainerEngine
from rlad_megatron.servers.transfer.shared_memory import SharedMemoryTrainerEngine, shares_memory


def release_cached_memory(group: dist.ProcessGroup | None) -> None:
    """Leave memory that the ranks do not need to servers that are about to take it. All ranks together.

    Nobody returns before all have done so: the first rank goes on to start servers, or to wake them up.
    """
    platform.empty_cache()
    barrier(group)


class WeightSync:
    """Pushes weights from all trainer ranks to the servers. A context manager: leaving it removes what it made."""

    def __init__(
        self,
        source: MegatronWeightSource,
        urls: Sequence[str],
        *,
        run_dir: Path,
        timeout_s: float,
        transfer: Transfer = ON_CPUS,
    ) -> None:
        """All ranks of the source's group together.

        urls: of the servers, by index. timeout_s: of each HTTP call. transfer: what the servers were started for.
        """
        self._group = source.group
        self._sleep_level = transfer.sleep_level
        # On every rank, so that all agree on how many there are; only the first rank calls them.
        self._clients = [ServerClient(index, url, timeout_s) for index, url in enumerate(urls)]
        self._engine: NcclTransfer | IpcTransfer | SharedMemoryTrainerEngine | SharedFileTrainerEngine
        if transfer.backend == NCCL:
            self._engine = NcclTransfer(source)
        elif transfer.backend == IPC:
            self._engine = IpcTransfer(source)
        elif shares_memory(urls, source.group):
            self._engine = SharedMemoryTrainerEngine(
                source=source, run_dir=run_dir, is_sender=is_first_rank(source.group)
            )
        else:
            self._engine = SharedFileTrainerEngine(source=source, run_dir=run_dir)

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def push(self, version: int, servers: Sequence[int] | None = None) -> None:
        """Give servers (default: all) the source's present weights as `version`. All ranks together.

        Servers that sleep are awake afterwards. A file of weights is written only when `version` differs from that of
        the last push. Raises WeightSyncError, on every rank, naming the server; the servers are then left paused,
        because their weights may be half old and half new.
        """
        clients = self._clients if servers is None else [self._clients[index] for index in servers]
        on_first_rank(lambda: for_each_server(self._begin, clients), self._group)
        self._engine.send(version, clients)
        if self._sleep_level:
            release_cached_memory(self._group)
        on_first_rank(lambda: for_each_server(lambda client: self._finish(client, version), clients), self._group)

    def sleep(self, servers: Sequence[int]) -> dict[int, WeightSyncError]:
        """Have servers give their GPUs' memory back until the next push. On the first rank alone.

        Returns why, by server, where one did not. Nothing happens where servers do not sleep.
        """
        errors: dict[int, WeightSyncError] = {}

        def attempt(client: ServerClient) -> None:
            try:
                client.sleep(self._sleep_level)
            except WeightSyncError as error:
                errors[client.index] = error

        if self._sleep_level:
            for_each_server(attempt, [self._clients[index] for index in servers])
        return errors

    def close(self) -> None:
        """Remove the file, or leave the groups."""
        self._engine.shutdown()

    def _begin(self, client: ServerClient) -> None:
        if self._sleep_level:
            # The cache comes back when the buffers of the transfer are gone.
            client.wake_up("weights")
        client.pause()

    def _finish(self, client: ServerClient, version: int) -> None:
        client.reset_prefix_cache()
        if self._sleep_level:
            client.wake_up("kv_cache")
        client.resume()
        held = client.weight_version()
        if held != str(version):
            raise WeightSyncError(f"{client.name} says it holds weights {held!r} after a push of {version}")
