"""The trainer's side of the `shared_memory` weight transfer: one file that all ranks write and the servers map.

The file is in the safetensors format, in memory (/dev/shm), as large as the model. Each rank writes its own slices in
place: nothing is gathered, and no rank holds more than its shard. It serves servers on the trainer's host, on CPUs and
GPUs alike; for others there is `collective.py`. The worker's side is `worker.py`.
"""

from __future__ import annotations

import math
import mmap
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from safetensors import safe_open

from rlad_megatron.errors import WeightSyncError
from rlad_megatron.models.gathered import GatheredWeights, TensorMetadata
from rlad_megatron.models.safetensors_files import safetensors_header
from rlad_megatron.parallel.collective import barrier, is_first_rank, on_first_rank
from rlad_megatron.servers.client import ServerClient, for_each_server
from rlad_megatron.servers.transfer.weights_file import VERSION_KEY, possible_files, version_text

ALIGNMENT = 64  # bytes; of the first tensor
NOT_READY = -1  # the version while ranks are writing


def header_and_bounds(tensors: Sequence[TensorMetadata], version: int) -> tuple[bytes, list[int]]:
    """The start of the file, with the version, and where each tensor starts, then the file's end.

    tensors: wide dtypes first, so that each is aligned.
    """
    named = {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors}
    return safetensors_header(named, metadata={VERSION_KEY: version_text(version)}, alignment=ALIGNMENT)


class SharedMemoryTransfer:
    """Writes the file and tells servers to read it."""

    def __init__(self, weights: GatheredWeights, run_dir: Path) -> None:
        """Collective. run_dir: names the file, and holds it if /dev/shm has no room."""
        self.weights = weights
        self.version = NOT_READY  # what the file holds
        tensors = self._in_file_order()
        _, bounds = header_and_bounds(tensors, NOT_READY)
        self.path = on_first_rank(lambda: create_file(run_dir, bounds[-1]), weights.group)
        with self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), bounds[-1])
        self._tensors: dict[str, torch.Tensor] = {}
        for tensor, start in zip(tensors, bounds, strict=False):
            flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=math.prod(tensor.shape), offset=start)
            self._tensors[tensor.name] = flat.view(tensor.shape)

    def write(self, version: int) -> None:
        """Put the present weights into the file, as `version`. Collective."""
        self.version = NOT_READY
        self._mark(NOT_READY)  # a reader in between is refused rather than given a mixture
        barrier(self.weights.group)
        self.weights.write_all(self._tensors)
        barrier(self.weights.group)
        self._mark(version)
        barrier(self.weights.group)  # from here on every rank finds the file complete
        self.version = version

    def prepare(self, version: int, clients: Sequence[ServerClient]) -> None:
        """Write the weights as `version`, unless the file holds it. Collective."""
        if version != self.version:
            self.write(version)

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """Make paused servers load the weights as `version`. Collective."""
        on_first_rank(lambda: for_each_server(partial(load_file, self.path, version), clients), self.weights.group)

    def _in_file_order(self) -> list[TensorMetadata]:
        return sorted(self.weights.metadata(), key=lambda tensor: -tensor.dtype.itemsize)

    def _mark(self, version: int) -> None:
        if is_first_rank(self.weights.group):
            header, _ = header_and_bounds(self._in_file_order(), version)
            self._map[: len(header)] = header


def load_file(path: Path, version: int, client: ServerClient) -> None:
    """Make one server load the file, which holds `version`."""
    client.start_weight_update()
    client.update_weights({"path": str(path), "version": version})
    client.finish_weight_update(str(version))


def tensors_of_file(path: Path, version: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor mapped from the file) of each tensor. Raises ValueError if the file holds another version."""
    with safe_open(path, framework="pt", device="cpu") as file:
        found = file.metadata()[VERSION_KEY]
        if found != version_text(version):
            raise ValueError(f"{path} holds weights {found}, not version {version}")
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def create_file(run_dir: Path, size: int) -> Path:
    """An empty file of `size` bytes, in memory if there is room, else in the run folder."""
    reasons = []
    for path in possible_files(run_dir):
        try:
            path.unlink(missing_ok=True)
            with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
                # Reserved now: a full /dev/shm would otherwise cause a bus error while writing.
                os.posix_fallocate(file.fileno(), 0, size)
            return path
        except OSError as error:
            with suppress(OSError):  # another user's
                path.unlink()
            reasons.append(f"{path.parent}: {error.strerror}")
    raise WeightSyncError(f"no room for {size / 2**30:.2f} GiB of weights ({'; '.join(reasons)}); free some space")


def shares_memory(urls: Sequence[str], group: dist.ProcessGroup | None) -> bool:
    """Whether all ranks of the group and all servers are on one host. Collective.

    urls: of the servers; only those on rank 0 count.
    """
    hosts = [socket.gethostname()]
    if group is not None:
        hosts *= dist.get_world_size(group)
        dist.all_gather_object(hosts, hosts[0], group=group)
    local = len(set(hosts)) == 1
    return on_first_rank(lambda: local and all(_is_own_address(urlsplit(url).hostname or "") for url in urls), group)


def _is_own_address(host: str) -> bool:
    """Whether a name or address is one of this host's: only those can be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
