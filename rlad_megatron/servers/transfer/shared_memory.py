"""The trainer's side of the `shared_memory` weight transfer: one file that all ranks write and the servers map.

The file is in the safetensors format, in memory (/dev/shm), as large as the model. Each rank writes its own
slices in place: nothing is gathered, and no rank holds more than its shard. It serves servers on the trainer's
host, on CPUs and GPUs alike; for others there is `shared_file.py`.

This module does not import vLLM; the worker's side is `worker.py`.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from rlad_megatron.errors import WeightSyncError
from rlad_megatron.models import safetensors_files
from rlad_megatron.models.gathered import MegatronWeightSource, TensorMetadata
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.servers.client import ServerClient, for_each_server
from rlad_megatron.servers.transfer.choice import SHARED_MEMORY

VERSION_KEY = "weight_version"  # in the safetensors metadata
MEMORY_DIR = Path("/dev/shm")
ALIGNMENT = 64  # bytes; of the first tensor
NOT_READY = -1  # the version while ranks are writing


class WeightClient(Protocol):
    """The calls of vLLM's `VLLMWeightSyncClient` that are used here."""

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@dataclass(frozen=True)
class SharedMemoryTrainerInitInfo:
    """For `WeightTransferTrainerFactory.trainer_init`; rank 0 is the one that talks to the server."""

    backend: ClassVar[str] = SHARED_MEMORY
    rank: int
    run_dir: Path

    @property
    def is_sender(self) -> bool:
        return self.rank == 0


def version_text(version: int) -> str:
    """A version at fixed width, so that it can be rewritten in place."""
    return f"{version:020d}"


def safetensors_header(tensors: Sequence[TensorMetadata], version: int) -> bytes:
    """The start of the file: a safetensors header with the version."""
    named = {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors}
    return safetensors_files.safetensors_header(
        named, metadata={VERSION_KEY: version_text(version)}, alignment=ALIGNMENT
    )[0]


class SharedMemoryTrainerEngine:
    """Writes the file and tells servers to read it.

    It has the interface of vLLM's `TrainerWeightTransferEngine` (see `MegatronWeightSource` for why it does not
    inherit from it), plus `send`, because one file serves many servers.
    """

    init_info_cls = SharedMemoryTrainerInitInfo

    def __init__(
        self, *, source: MegatronWeightSource, run_dir: Path, client: WeightClient | None = None, is_sender: bool = True
    ) -> None:
        """All ranks of the source's group together. run_dir: gives the file its name; holds it without /dev/shm."""
        self.source = source
        self.client = client
        self.is_sender = is_sender
        self.version = NOT_READY  # what the file holds
        tensors = source.metadata()
        self._header_bytes = len(safetensors_header(tensors, NOT_READY))
        size = self._header_bytes + sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
        self.path = on_first_rank(lambda: _create(Path(run_dir), size), source.group)
        with self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._tensors: dict[str, torch.Tensor] = {}
        offset = self._header_bytes
        for tensor in tensors:
            count = math.prod(tensor.shape)
            flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=count, offset=offset)
            self._tensors[tensor.name] = flat.view(tensor.shape)
            offset += count * tensor.dtype.itemsize

    @classmethod
    def trainer_init(
        cls, init_info: SharedMemoryTrainerInitInfo, *, client: WeightClient, source: MegatronWeightSource | None = None
    ) -> SharedMemoryTrainerEngine:
        """The constructor in the form that vLLM's factory calls."""
        assert source is not None, "the shared_memory engine sends a whole model: it needs a source"
        return cls(source=source, run_dir=init_info.run_dir, client=client, is_sender=init_info.is_sender)

    def write(self, version: int) -> None:
        """Put the source's present weights into the file, as `version`. All ranks together."""
        self.version = NOT_READY
        self._mark(NOT_READY)  # a reader in between is refused rather than given a mixture
        self._barrier()
        self.source.write_all(self._tensors)
        self._barrier()
        self._mark(version)
        self._barrier()  # from here on every rank finds the file complete
        self.version = version

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """Make paused servers load the source's weights as `version`, written if they are not. All ranks together."""
        if version != self.version:
            self.write(version)
        on_first_rank(lambda: for_each_server(partial(load_file, self.path, version), clients), self.source.group)

    def send_weights(self) -> None:
        """Write the next version and make the client's server load it. All ranks together."""
        self.write(self.version + 1)
        if self.is_sender:
            assert self.client is not None
            load_file(self.path, self.version, self.client)
        self._barrier()

    def shutdown(self) -> None:
        """Remove the file. Servers that map it keep what they have loaded. Safe to call twice."""
        self._tensors.clear()
        if self.is_sender:
            self.path.unlink(missing_ok=True)

    def _mark(self, version: int) -> None:
        if self.is_sender:
            self._map[: self._header_bytes] = safetensors_header(self.source.metadata(), version)

    def _barrier(self) -> None:
        if self.source.group is not None:
            dist.barrier(group=self.source.group)


def load_file(path: Path, version: int, client: WeightClient) -> None:
    """Make one server load the file, which holds `version`."""
    client.start_weight_update()
    client.update_weights({"path": str(path), "version": version})
    client.finish_weight_update(str(version))


def file_in_run_dir(run_dir: Path) -> Path:
    """Where the run's weights lie when they are not in memory. Named after the folder, so one for each run."""
    folder = run_dir.resolve()
    return folder / f"rlad_{hashlib.sha1(str(folder).encode()).hexdigest()[:16]}.safetensors"


def _places(run_dir: Path) -> list[Path]:
    """Where the run's file may be: in memory, else in the run folder."""
    path = file_in_run_dir(run_dir)
    return [MEMORY_DIR / path.name, path]


def remove_file(run_dir: Path) -> None:
    """Remove what a run left behind whose first rank was killed."""
    for path in _places(run_dir):
        path.unlink(missing_ok=True)


def _create(run_dir: Path, size: int) -> Path:
    """An empty file of `size` bytes, in memory if there is room, else in the run folder."""
    reasons = []
    for path in _places(run_dir):
        try:
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                # Reserved now: a full /dev/shm would otherwise show itself as a bus error while writing.
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)
            return path
        except OSError as error:
            path.unlink(missing_ok=True)
            reasons.append(f"{path.parent}: {error.strerror}")
    raise WeightSyncError(f"no room for {size / 2**30:.2f} GiB of weights ({'; '.join(reasons)}); free some space")


def shares_memory(urls: Sequence[str], group: dist.ProcessGroup | None) -> bool:
    """Whether all ranks of the group and all servers are on one host. The same on every rank.

    urls: of the servers; only rank 0's count.
    """
    if group is not None:
        hosts: list[str] = [""] * dist.get_world_size(group)
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        if len(set(hosts)) > 1:
            return False
    return on_first_rank(lambda: all(_is_own_address(urlsplit(url).hostname or "") for url in urls), group)


def _is_own_address(host: str) -> bool:
    """Whether a name or address is one of this host's: only those can be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
