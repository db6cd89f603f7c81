"""The trainer's side of the `collective` weight transfer: the owners of the weights send, all servers receive.

An owner is a rank that holds slices of the weights that no other one sends. It sends its own slices in buckets to the
workers of all servers, in a group with them (`platform/broadcast.py`); nothing is gathered on the trainer. The worker's
side is `receiver.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import asdict
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist

from rlad_megatron.errors import RladError, WeightSyncError
from rlad_megatron.models.gathered import GatheredWeights, Values
from rlad_megatron.parallel.collective import is_first_rank, on_first_rank
from rlad_megatron.platform.broadcast import BroadcastGroup, Wait, open_broadcast_group
from rlad_megatron.servers.client import UNPUSHED, ServerClient, for_each_server
from rlad_megatron.servers.transfer.buckets import Cargo, bucket_size, first_difference
from rlad_megatron.servers.transfer.membership import (
    BROKEN_OFF,
    Meeting,
    MembershipError,
    address_towards,
    attend,
    first_line,
    host_of,
)
from rlad_megatron.servers.transfer.receiver import (
    BUFFERS,
    Invitation,
    member_name,
    send_bytes,
)

STALL_S = 60.0  # a member that makes no progress for so long is lost; at most half of rollout.request_timeout_s

ANSWER_S = 5.0  # how long servers have to say why, once one has lost another

T = TypeVar("T")


class CollectiveTransfer:
    """For servers anywhere. Methods are collective over the trainer's ranks and raise the same error on all of them."""

    def __init__(self, weights: GatheredWeights, bucket_bytes: int) -> None:
        """bucket_bytes: of all owners' buckets together, so a rank and a worker hold at most two times that."""
        self.weights = weights
        self._rank = 0 if weights.group is None else dist.get_rank(weights.group)
        self._owned = weights.owned()
        lists = self._gather((self._rank if self._owned else None, weights.metadata()))
        self._owners = [rank for rank, _ in lists if rank is not None]
        for rank, (_, tensors) in enumerate(lists):
            if difference := first_difference(lists[0][1], tensors):
                raise WeightSyncError(
                    f"ranks 0 and {rank} of the trainer send different models: {difference}; start all ranks from one "
                    "configuration and one student.path"
                )
        self._cargo = Cargo(weights.metadata(), [(owned.tensor, owned.box) for owned in self._owned])
        self._bucket_bytes = bucket_bytes // len(self._owners)
        self._buckets = self._cargo.buckets(self._bucket_bytes)
        self._members: list[int] = []  # servers in the group
        self._meeting: Meeting | None = None  # on the first rank
        self._channel: BroadcastGroup | None = None  # on owners
        self._buffers: list[torch.Tensor] = []  # during a push
        self._values = Values()

    def prepare(self, version: int, clients: Sequence[ServerClient]) -> None:
        """What can be done before servers pause: form the group if it changed, and fill the first buckets."""
        unpushed = on_first_rank(lambda: any(c.weight_version() == UNPUSHED for c in clients), self._group)
        if unpushed or self._members != [client.index for client in clients]:
            self.close()
            self._join(clients)
        self._allocate()
        for index in range(len(self._buffers)):
            self._pack(index)

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """Give paused servers the weights of `prepare` as `version`. Raises RolloutError or WeightSyncError."""
        on_first_rank(lambda: for_each_server(lambda client: client.start_weight_update(), clients), self._group)
        updates: dict[str, Future[None]] = {}
        if is_first_rank(self._group):
            for client in clients:
                updates[client.name] = in_background(partial(client.update_weights, {"version": version}))
        error = ""
        try:
            self._send_buckets()
        except RuntimeError as caught:
            self._close_channel()  # so that receivers notice
            error = f"rank {self._rank} of the trainer could not send: {first_line(caught)}"
        finally:
            self._buffers, self._values = [], Values()
        try:
            on_first_rank(lambda: raise_cause(updates), self._group)
            if lost := [text for text in self._gather(error) if text]:
                raise WeightSyncError(f"{lost[0]}; see the servers' logs")
        except RladError:
            self.close()
            raise
        on_first_rank(
            lambda: for_each_server(lambda client: client.finish_weight_update(str(version)), clients), self._group
        )

    def close(self) -> None:
        """Leave the group. Safe to call twice."""
        self._close_channel()
        self._members, self._meeting = [], None

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self.weights.group

    def _gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self._group is None:
            return [value]
        values = [value] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _join(self, clients: Sequence[ServerClient]) -> None:
        """Form the groups of all owners with the workers of these servers."""
        timeout_s = min(STALL_S, clients[0].timeout_s / 2)
        calls: dict[str, Future[None]] = {}
        invitations = on_first_rank(lambda: self._invite(clients, timeout_s), self._group)
        if is_first_rank(self._group):
            for client, told in zip(clients, invitations, strict=True):
                calls[client.name] = in_background(partial(join_server, client, told))
        # Rank 0 gathers on a thread: it may be an owner itself.
        workers = [member_name(told.server, worker) for told in invitations for worker in range(told.workers)]
        owners = [owner_name(rank) for rank in self._owners]
        gathered: Future[None] | None = None
        if self._meeting is not None:
            meeting = self._meeting
            gathered = in_background(
                lambda: meeting.gather([*owners, *workers], timeout_s, lambda: any(map(failed, calls.values())))
            )
        error = ""
        try:
            if self._owned:
                self._open_channel(invitations[0])
        except MembershipError as caught:
            error = str(caught)
        try:
            on_first_rank(lambda: self._conclude(calls, gathered), self._group)
            if lost := [text for text in self._gather(error) if text]:
                raise WeightSyncError(f"the trainer and the servers did not form a group: {lost[0]}")
        except RladError:
            self.close()
            raise
        self._members = [client.index for client in clients]

    def _invite(self, clients: Sequence[ServerClient], timeout_s: float) -> list[Invitation]:
        """On the first rank: open the store, and write each server's invitation."""
        addresses = []
        for client in clients:
            try:
                addresses.append(address_towards(host_of(client.url)))
            except OSError as error:
                raise WeightSyncError(f"the trainer has no route to {client.name} ({error})") from error
        self._meeting = Meeting(addresses)
        counts = [client.workers() for client in clients]
        return [
            Invitation(
                address=address,
                port=self._meeting.port,
                server=client.name,
                first=sum(counts[:index]),
                workers=counts[index],
                size=sum(counts),
                owners=len(self._owners),
                bucket_bytes=self._bucket_bytes,
                timeout_s=timeout_s,
            )
            for index, (client, address) in enumerate(zip(clients, addresses, strict=True))
        ]

    def _open_channel(self, told: Invitation) -> None:
        name, owner = owner_name(self._rank), self._owners.index(self._rank)
        store, own = attend(name, told.address, told.port, told.timeout_s, {owner: 0}, told.size)
        try:
            part = dist.PrefixStore(f"owner {owner}", store)
            self._channel = open_broadcast_group(part, 0, 1 + told.size, own, told.timeout_s)
            send_bytes(self._channel, self._cargo.to_bytes(), self.weights.device)
        except RuntimeError as error:
            self._close_channel()
            raise MembershipError(f"{name} at {own} lost a member: {first_line(error)}") from error

    def _conclude(self, calls: Mapping[str, Future[None]], gathered: Future[None] | None) -> None:
        """On the first rank: raise what went wrong while joining, the servers' own errors first."""
        assert gathered is not None
        try:
            gathered.result()
        except MembershipError as error:
            raise_cause({name: call for name, call in calls.items() if failed(call)})
            raise WeightSyncError(
                f"the trainer and the servers did not form a group: {error}; see their logs"
            ) from None
        raise_cause(calls)

    def _allocate(self) -> None:
        """Make the buffers of a push."""
        largest = max(map(bucket_size, self._buckets), default=0)
        self._values = Values()
        self._buffers = [
            torch.empty(largest, dtype=torch.uint8, device=self.weights.device) for _ in self._buckets[:BUFFERS]
        ]

    def _send_buckets(self) -> None:
        assert self._channel is not None or not self._owned
        waits: list[Wait] = []
        for index, bucket in enumerate(self._buckets):
            if index >= BUFFERS:
                waits[index - BUFFERS]()
                self._pack(index)
            assert self._channel is not None
            waits.append(self._channel.transfer(self._buffers[index % BUFFERS][: bucket_size(bucket)]))
        for done in waits[-BUFFERS:]:
            done()

    @torch.no_grad()
    def _pack(self, index: int) -> None:
        """Copy a bucket's parts into its buffer: FP8 weights dequantized, as the trainer multiplies by them."""
        for part in self._buckets[index]:
            owned = self._owned[part.slice]
            first = owned.box[0][0]
            start, stop = part.box[0]
            target = part.view(self._buffers[index % BUFFERS], self._cargo.tensors[owned.tensor].dtype)
            target.copy_(self._values.of(owned)[start - first : stop - first])


def owner_name(rank: int) -> str:
    return f"rank {rank} of the trainer"


def join_server(client: ServerClient, invitation: Invitation) -> None:
    client.shutdown_weight_transfer_engine()  # an earlier group's, if there was one
    client.init_weight_transfer_engine(asdict(invitation))


def in_background(action: Callable[[], T]) -> Future[T]:
    """Run `action` on a daemon thread: one that never ends does not keep the process alive."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(action())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result


def failed(call: Future[None]) -> bool:
    return call.done() and call.exception() is not None


def raise_cause(calls: Mapping[str, Future[None]]) -> None:
    """Wait for the calls of all servers, by name, and raise the error that explains the others, if there is one."""
    wait(calls.values(), return_when=FIRST_EXCEPTION)
    if any(map(failed, calls.values())):
        wait(calls.values(), ANSWER_S)
    errors = [error for call in calls.values() if call.done() and (error := call.exception()) is not None]
    for error in errors:
        if BROKEN_OFF not in str(error):
            raise error
    for error in errors:
        silent = [name for name, call in calls.items() if not call.done()]
        if silent:
            raise WeightSyncError(f"{', '.join(silent)} does not answer; {error}") from error
        raise error
