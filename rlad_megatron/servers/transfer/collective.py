"""The trainer's side of the `collective` weight transfer: the owners of the weights send, all servers receive.

An owner is a rank that holds slices of the weights that no other one sends. It sends its own slices in buckets to the
workers of all servers, in a group with them (`platform/broadcast.py`); nothing is gathered on the trainer. The worker's
side is `receiver.py`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist

from rlad_megatron.errors import RolloutError, WeightSyncError
from rlad_megatron.models.gathered import GatheredWeights, Values
from rlad_megatron.parallel.collective import is_first_rank, on_first_rank
from rlad_megatron.platform.broadcast import BroadcastGroup, Wait, open_broadcast_group
from rlad_megatron.servers.client import UNPUSHED, ServerClient, for_each_server
from rlad_megatron.servers.transfer.buckets import Cargo, bucket_size, first_difference, tensors_to_bytes
from rlad_megatron.servers.transfer.membership import (
    BROKEN_OFF,
    Meeting,
    address_towards,
    attend,
    error_of,
    host_of,
    reach,
    without_loopback,
)
from rlad_megatron.servers.transfer.receiver import (
    BUFFERS,
    Invitation,
    LeftOnError,
    member_name,
    send_bytes,
)

JOIN_S = 60.0  # a member that has not come then is lost; at most half of rollout.request_timeout_s
ANSWER_S = 3.0  # how long servers have to say why, once one has lost another

T = TypeVar("T")


class CollectiveTransfer:
    """For servers anywhere. Methods are collective over the trainer's ranks and raise the same error on all of them."""

    def __init__(self, weights: GatheredWeights, bucket_bytes: int) -> None:
        """bucket_bytes: of all owners' buckets together, so a rank and a worker hold at most two times that."""
        self.weights = weights
        self._rank = 0 if weights.group is None else dist.get_rank(weights.group)
        self._name = owner_name(self._rank)
        self._owned = weights.owned()
        tensors = weights.metadata()
        told = self._gather((bool(self._owned), hashlib.sha256(repr(tensors).encode()).digest()))
        if other := next((rank for rank, (_, found) in enumerate(told) if found != told[0][1]), 0):
            # Only these two lists: one of a large model has megabytes.
            lists = self._gather(tensors if self._rank in (0, other) else [])
            raise WeightSyncError(
                f"ranks 0 and {other} of the trainer send different models: "
                f"{first_difference(lists[0], lists[other])}; start all ranks from one configuration and one "
                "student.path"
            )
        self._owners = [rank for rank, (owns, _) in enumerate(told) if owns]
        self._cargo = Cargo(tensors, [(owned.tensor, owned.box) for owned in self._owned])
        self._bucket_bytes = bucket_bytes // len(self._owners)
        self._buckets = self._cargo.buckets(self._bucket_bytes)
        self._members: list[int] = []  # servers in the group
        self._meeting: Meeting | None = None  # on the first rank
        self._channel: BroadcastGroup | None = None  # on owners
        self._buffers: list[torch.Tensor] = []  # during a push
        self._values = Values()

    def prepare(self, version: int, clients: Sequence[ServerClient]) -> None:
        """What can be done before servers pause: form the group if it changed, and fill the first buckets."""
        with self._closed_on_error():
            held = on_first_rank(lambda: for_each_server(lambda client: client.weight_version(), clients), self._group)
            if UNPUSHED in held or self._members != [client.index for client in clients]:
                self.close()
                self._join(clients)
            raise_cause({}, self._errors(self._fill))

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """Give paused servers the weights of `prepare` as `version`. Raises RolloutError or WeightSyncError."""
        with self._closed_on_error():
            on_first_rank(lambda: for_each_server(lambda client: client.start_weight_update(), clients), self._group)
            updates: dict[str, Future[None]] = {}
            if is_first_rank(self._group):
                for client in clients:
                    updates[client.name] = in_background(partial(update_server, client, version))
            errors = self._errors(self._send)
            on_first_rank(lambda: raise_cause(updates, errors), self._group)
            on_first_rank(
                lambda: for_each_server(lambda client: client.finish_weight_update(str(version)), clients), self._group
            )

    def close(self) -> None:
        """Leave the group. Safe to call twice."""
        self._close_channel()
        self._members, self._meeting = [], None
        self._buffers, self._values = [], Values()

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self.weights.group

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """Leave the group on an error; servers end what they have begun when they join again."""
        try:
            yield
        except Exception:
            self.close()
            raise

    def _errors(self, action: Callable[[], object]) -> list[str]:
        """Run `action` on every rank; returns the errors of all ranks, on all of them."""
        return [text for text in self._gather(error_of(self._name, action)) if text]

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
        invitations = on_first_rank(lambda: self._invite(clients), self._group)
        told = invitations[0]
        # First of all: the others would wait for an owner that does not reach the store.
        raise_cause(
            {}, self._errors(lambda: self._owned and reach(self._name, told.address, told.port, told.timeout_s))
        )
        calls: dict[str, Future[None]] = {}
        gathered: Future[None] | None = None
        if self._meeting is not None:
            for client, invitation in zip(clients, invitations, strict=True):
                calls[client.name] = in_background(partial(join_server, client, invitation))
            workers = [member_name(each.server, worker) for each in invitations for worker in range(each.workers)]
            members = [*map(owner_name, self._owners), *workers]
            meeting = self._meeting
            # On a thread, because this rank may be an owner itself.
            gathered = in_background(
                lambda: meeting.gather(members, told.timeout_s, lambda: any(map(failed, calls.values())))
            )
        errors = self._errors(lambda: self._open_channel(told))
        on_first_rank(lambda: self._conclude(calls, gathered, errors), self._group)
        self._members = [client.index for client in clients]

    def _invite(self, clients: Sequence[ServerClient]) -> list[Invitation]:
        """On the first rank: open the store, and write each server's invitation."""
        addresses = []
        for client in clients:
            try:
                addresses.append(address_towards(host_of(client.url)))
            except OSError as error:
                raise WeightSyncError(f"the trainer has no route to {client.name} ({error})") from error
        addresses = without_loopback(addresses)
        try:
            self._meeting = Meeting(addresses)
        except OSError as error:
            raise WeightSyncError(f"the trainer cannot listen at {', '.join(addresses)} ({error})") from error
        counts = for_each_server(lambda client: client.workers(), clients)
        half_s = clients[0].timeout_s / 2
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
                device=self.weights.device.type,
                timeout_s=min(JOIN_S, half_s),
                stall_s=half_s,
            )
            for index, (client, address) in enumerate(zip(clients, addresses, strict=True))
        ]

    def _open_channel(self, told: Invitation) -> None:
        """Join the group in which this rank sends, if it is an owner, and say what it will send."""
        if not self._owned:
            return
        owner = self._owners.index(self._rank)
        store, own = attend(self._name, told.address, told.port, told.timeout_s, {owner: 0}, told.size)
        with LeftOnError(f"{self._name} at {own}", self._close_channel):
            part = dist.PrefixStore(f"owner {owner}", store)
            self._channel = open_broadcast_group(part, 0, 1 + told.size, own, told.stall_s)
            if owner == 0:
                send_bytes(self._channel, tensors_to_bytes(self._cargo.tensors), self.weights.device)
            send_bytes(self._channel, self._cargo.to_bytes(), self.weights.device)

    def _conclude(
        self, calls: Mapping[str, Future[None]], gathered: Future[None] | None, errors: Sequence[str]
    ) -> None:
        """On the first rank: raise what went wrong while joining."""
        assert gathered is not None
        if why := gathered.exception():
            wait(calls.values(), ANSWER_S)  # a server may know more
            answered = {name: call for name, call in calls.items() if call.done()}
            raise_cause(answered, errors, f"the trainer and the servers did not form a group: {why}; see their logs")
        raise_cause(calls, errors)

    def _allocate(self) -> None:
        """Make the buffers of a push."""
        largest = max(map(bucket_size, self._buckets), default=0)
        self._values = Values()
        self._buffers = [
            torch.empty(largest, dtype=torch.uint8, device=self.weights.device) for _ in self._buckets[:BUFFERS]
        ]

    def _fill(self) -> None:
        """Make the buffers, and pack the first buckets."""
        self._allocate()
        for index in range(len(self._buffers)):
            self._pack(index)

    def _send(self) -> None:
        """Send the buckets, and free the buffers."""
        try:
            with LeftOnError(self._name, self._close_channel):
                self._send_buckets()
        finally:
            self._buffers, self._values = [], Values()

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
    check_workers(client, "leave_transfer")  # an earlier group, if there was one
    client.init_weight_transfer_engine(asdict(invitation))
    check_workers(client, "transfer_error")


def update_server(client: ServerClient, version: int) -> None:
    client.update_weights({"version": version})
    check_workers(client, "transfer_error")


def check_workers(client: ServerClient, method: str) -> None:
    """Call a method of the workers that returns an error, if there is one; raises it as a RolloutError."""
    errors = filter(None, client.call_workers(method))
    if error := min(errors, key=is_consequence, default=""):
        raise RolloutError(f"{client.name}: {error}; see its log")


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


def is_consequence(error: str | BaseException) -> bool:
    return BROKEN_OFF in str(error)


def raise_cause(calls: Mapping[str, Future[None]], errors: Sequence[str], otherwise: str = "") -> None:
    """Wait for the calls of all servers, by name, and raise the error that explains the others, if there is one.

    errors: of the trainer's ranks. otherwise: an error that explains those of members which were told of it.
    """
    if all(map(is_consequence, errors)):
        wait(calls.values(), return_when=FIRST_EXCEPTION)
    if errors or any(map(failed, calls.values())):
        wait(calls.values(), ANSWER_S)
    answers = [error for call in calls.values() if call.done() and (error := call.exception()) is not None]
    causes = [*map(WeightSyncError, errors), *answers, *map(WeightSyncError, filter(None, [otherwise]))]
    if not causes:
        return
    cause = min(causes, key=is_consequence)
    silent = [name for name, call in calls.items() if not call.done()]
    if silent and is_consequence(cause):
        raise WeightSyncError(f"{', '.join(silent)} does not answer; {cause}") from cause
    raise cause
