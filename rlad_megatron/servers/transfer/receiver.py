"""The receiving side of the `collective` transfer. It needs no vLLM: `worker.py` loads what comes out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlad_megatron.platform.broadcast import BroadcastGroup, PeerLost, Wait, open_broadcast_group
from rlad_megatron.servers.transfer.buckets import (
    Assembly,
    Cargo,
    bucket_size,
    check_tiling,
    merged_order,
    tensors_from_bytes,
)
from rlad_megatron.servers.transfer.membership import BROKEN_OFF, MembershipError, attend, first_line

BUFFERS = 2  # of each owner


@dataclass
class Invitation:
    """What a server's workers need to know to join, as JSON."""

    address: str  # of the trainer's store
    port: int
    server: str  # name
    first: int  # workers of the servers before this one
    workers: int  # of this server
    size: int  # workers of all servers
    owners: int
    bucket_bytes: int  # of each owner's bucket
    device: str  # type of the owners' devices
    timeout_s: float  # for members to come
    stall_s: float  # without progress in a transfer


def member_name(server: str, worker: int) -> str:
    return f"worker {worker} of {server}"


class LeftOnError:
    """Has `name` leave its groups on any error, so that its neighbours notice. Raises PeerLost as MembershipError.

    Not by `contextmanager`: in Python 3.12 its frames and the error refer to each other, and keep connections open.
    """

    def __init__(self, name: str, close: Callable[[], None]) -> None:
        self._name, self._close = name, close

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception):
            self._close()
        if isinstance(error, PeerLost):
            raise MembershipError(f"{BROKEN_OFF}: {self._name} lost a member: {first_line(error)}") from error


class Receiver:
    """One worker's part in the groups of all owners."""

    def __init__(self, invitation: Invitation, worker: int, device: torch.device) -> None:
        """Join. Raises MembershipError, or ValueError if the owners' slices do not make up the tensors.

        worker: index of this worker in its server.
        """
        told = invitation
        self.device = device
        self.name = name = member_name(told.server, worker)
        if told.device != device.type:
            raise MembershipError(
                f"the trainer's weights are on {told.device}, and {name} is on {device.type}; run both on one kind of "
                "device, or on one host with rollout.weight_transfer=shared_memory"
            )
        # A server's first worker is another one for each owner, so that all its network cards are used.
        ranks = {owner: 1 + told.first + (worker - owner) % told.workers for owner in range(told.owners)}
        store, own = attend(name, told.address, told.port, told.timeout_s, ranks, told.size)
        self._groups: list[BroadcastGroup] = []
        with LeftOnError(f"{name} at {own}", self.close):
            for owner, rank in ranks.items():
                part = dist.PrefixStore(f"owner {owner}", store)
                self._groups.append(open_broadcast_group(part, rank, 1 + told.size, own, told.stall_s))
            self.tensors = tensors_from_bytes(receive_bytes(self._groups[0], device))
            self._cargos = [Cargo.from_bytes(receive_bytes(group, device), self.tensors) for group in self._groups]
            check_tiling(self.tensors, self._cargos)
        self._buckets = [cargo.buckets(told.bucket_bytes) for cargo in self._cargos]

    def receive(self, load: Callable[[Iterable[tuple[str, torch.Tensor]]], object]) -> None:
        """Give `load` the (name, whole tensor) of one push as they come.

        Raises the error of `load`, or MembershipError if a member is gone; then join again.
        """
        tensors = self._tensors()
        try:
            load(tensors)
        finally:
            deque(tensors, maxlen=0)  # after an error too: other workers get the weights through this one

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        if not self._groups:
            raise MembershipError(f"{self.name} is in no group; join again")
        assembly = Assembly(self.tensors, self.device)
        buffers: list[list[torch.Tensor]] = []
        waits: list[list[Wait]] = [[] for _ in self._buckets]

        def begin(owner: int, index: int) -> None:
            if index < len(self._buckets[owner]):
                target = buffers[owner][index % BUFFERS][: bucket_size(self._buckets[owner][index])]
                waits[owner].append(self._groups[owner].transfer(target))

        with LeftOnError(self.name, self.close):
            for buckets in self._buckets:
                size = max(map(bucket_size, buckets))
                buffers.append([torch.empty(size, dtype=torch.uint8, device=self.device) for _ in buckets[:BUFFERS]])
            for index in range(BUFFERS):
                for owner in range(len(self._groups)):
                    begin(owner, index)
            for owner, index in merged_order([len(buckets) for buckets in self._buckets]):
                waits[owner][index]()
                cargo = self._cargos[owner]
                for part in self._buckets[owner][index]:
                    tensor, _ = cargo.slices[part.slice]
                    values = part.view(buffers[owner][index % BUFFERS], self.tensors[tensor].dtype)
                    if whole := assembly.add(tensor, part.box, values):
                        yield whole
                begin(owner, index + BUFFERS)

    def close(self) -> None:
        while self._groups:
            self._groups.pop().close()


def send_bytes(group: BroadcastGroup, data: bytes, device: torch.device) -> None:
    """The counterpart of `receive_bytes`, on the group's rank 0."""
    for content in (len(data).to_bytes(8, "little"), data):
        group.transfer(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device))()


def receive_bytes(group: BroadcastGroup, device: torch.device) -> bytes:
    size = torch.empty(8, dtype=torch.uint8, device=device)
    group.transfer(size)()
    data = torch.empty(int.from_bytes(bytes(size.tolist()), "little"), dtype=torch.uint8, device=device)
    group.transfer(data)()
    return data.cpu().numpy().tobytes()
