"""The collective weight transfer, from gloo ranks to processes that run the worker's receiving code."""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import harness
import pytest
import receiver_server
import torch
import torch.distributed as dist
from harness import run_ranks
from test_weight_source import SHAPES, make_weights

from rlad_megatron.errors import RladError, WeightSyncError
from rlad_megatron.models.box import Box
from rlad_megatron.models.fingerprint import fingerprint
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.models.shard_plan import Piece, ShardEntry
from rlad_megatron.servers.client import ServerClient
from rlad_megatron.servers.transfer import collective
from rlad_megatron.servers.transfer.collective import CollectiveTransfer

pytestmark = pytest.mark.multiproc

TIMEOUT_S = 120.0  # rollout.request_timeout_s
SHORT_S = 10.0  # where the time is spent
ROWS, COLUMNS, LAYERS = 256, 1024, 24  # 1 MB a tensor


@contextmanager
def receivers(*workers: int) -> Iterator[list[tuple[str, int]]]:
    """(URL, process id) of servers with so many workers each."""
    context, processes, found = harness.context(), [], []
    try:
        for count in workers:
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=run_server, args=(theirs, count)))
            processes[-1].start()
            found.append((ours.recv(), processes[-1].pid))
        yield found
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_server(pipe, workers: int) -> None:
    gc.disable()  # a member that leaves must close its connections without it
    receiver_server.serve("127.0.0.1", workers, pipe.send)


def clients_of(servers, timeout_s: float = TIMEOUT_S) -> list[ServerClient]:
    return [ServerClient(index, url, timeout_s) for index, (url, _) in enumerate(servers)]


def push(transfer: CollectiveTransfer, version: int, clients: list[ServerClient]) -> str:
    """The error, or nothing."""
    try:
        transfer.prepare(version, clients)
        transfer.send(version, clients)
    except RladError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def held(client: ServerClient) -> list[dict[str, int]]:
    return client._ask("held", list, "GET", "/held")


def large_weights(rank: int, ranks: int, seed: int) -> tuple[GatheredWeights, dict[str, int]]:
    """Each rank holds a band of columns of every layer, as a row-parallel matrix is cut; and the fingerprints."""
    entries, parameters, shapes, expected = [], {}, {}, {}
    for layer in range(LAYERS):
        name = f"layers.{layer}.weight"
        whole = torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(1000 * seed + layer))
        start, stop = rank * COLUMNS // ranks, (rank + 1) * COLUMNS // ranks
        parameters[f"local.{name}"] = whole[:, start:stop].contiguous()
        piece = Piece(name, Box(((0, ROWS), (start, stop))), Box.whole((ROWS, stop - start)))
        entries.append(ShardEntry(f"local.{name}", (ROWS, stop - start), (piece,), True))
        shapes[name], expected[name] = (ROWS, COLUMNS), fingerprint(whole).item()
    group = dist.group.WORLD
    return GatheredWeights(entries, parameters, shapes, dtype=torch.float32, group=group), expected


def small_buckets(rank: int, world_size: int, servers) -> list[str]:
    """Two tensor-parallel owners, with slices cut over buckets of two rows; a rank without slices sends nothing."""
    weights, parameters = make_weights(min(rank, 1), dist.group.WORLD, dtype=torch.bfloat16, is_owner=rank < 2)
    transfer, clients, errors = CollectiveTransfer(weights, 64), clients_of(servers), []
    for version, factor in ((7, 1), (8, 2), (9, 4)):
        errors.append(push(transfer, version, clients))
        expected = weights.fingerprints()
        for client in clients if rank == 0 else ():
            assert client.weight_version() == str(version)
            for worker in held(client):
                assert worker == expected and set(worker) == set(SHAPES), (version, client.name)
        dist.barrier()
        for parameter in parameters.values():
            parameter.mul_(2 * factor)
    transfer.close()
    transfer.close()
    return errors


def test_every_worker_gets_the_present_values_bit_for_bit():
    with receivers(1, 2, 1) as servers:
        assert run_ranks(small_buckets, 3, servers) == [["", "", ""]] * 3


def one_process(url: str) -> str:
    weights, _ = make_weights(0, None)
    return push(CollectiveTransfer(weights, 1000), 1, clients_of([(url, 0)]))


def test_slices_that_do_not_make_up_a_tensor_are_refused():
    with receivers(1) as servers:
        told = one_process(servers[0][0])
    assert "server 0" in told and "the trainer's ranks send 16 elements of embed [6, 4] float32" in told


def other_list(rank: int, world_size: int) -> str:
    weights, _ = make_weights(rank, dist.group.WORLD)
    if rank:
        weights._shapes["norm"] = (6,)
    with pytest.raises(WeightSyncError) as caught:
        CollectiveTransfer(weights, 1000)
    return str(caught.value)


def test_ranks_that_disagree_on_the_tensors_are_named():
    first, second = run_ranks(other_list, 2)
    assert first == second
    assert first.startswith("ranks 0 and 1 of the trainer send different models: norm [5] float32 against norm [6] ")


def killed(rank: int, world_size: int, servers, kills: int) -> list[tuple[str, float]]:
    """Servers 0 and 2 stay; server 1 is another one in each round, and is killed after some tensors."""
    weights, expected = large_weights(rank, world_size, seed=1)
    transfer, told = CollectiveTransfer(weights, 4_000_000), []
    for round_ in range(kills):
        clients = clients_of([servers[0], servers[2 + round_], servers[1]])
        assert push(transfer, 100 + round_, clients) == ""
        if rank == 0:
            clients[1]._call("POST", "/misbehave", json={"dies_after": 2 * round_})
        begin = time.monotonic()
        error = push(transfer, 200 + round_, clients)
        told.append((error, time.monotonic() - begin))
    assert push(transfer, 300, clients_of(servers[:2])) == ""
    if rank == 0:
        for client in clients_of(servers[:2]):
            assert held(client) == [expected]
    dist.barrier()
    return told


def test_a_worker_killed_in_mid_push_ends_it_with_its_name_in_ten_of_ten_tries():
    with receivers(*[1] * 12) as servers:
        told = run_ranks(killed, 2, servers, 10)
    for round_ in range(10):
        assert told[0][round_][0] == told[1][round_][0]
        for error, seconds in (ranks[round_] for ranks in told):
            assert error.startswith(f"ServerDownError: server 1 ({servers[2 + round_][0]}) did not answer"), error
            assert seconds < TIMEOUT_S


def cannot_load(rank: int, world_size: int, servers) -> tuple[str, str]:
    weights, expected = large_weights(rank, world_size, seed=4)
    transfer, clients = CollectiveTransfer(weights, 1_000_000), clients_of(servers)
    if rank == 0:
        clients[1]._call("POST", "/misbehave", json={"fails_after": 3})
    first = push(transfer, 1, clients)
    if rank == 0:
        assert [held(client) for client in clients] == [[expected], [{}], [expected]]
        assert [client.weight_version() for client in clients] == ["default"] * 3
        clients[1]._call("POST", "/misbehave", json={})
    second = push(transfer, 2, clients)
    if rank == 0:
        assert [held(client) for client in clients] == [[expected]] * 3
    dist.barrier()
    return first, second


def test_a_worker_that_cannot_load_passes_the_weights_on():
    with receivers(1, 1, 1) as servers:
        for first, second in run_ranks(cannot_load, 2, servers):
            assert first.startswith("RolloutError: server 1 (") and "worker 0: ValueError: cannot load" in first
            assert second == ""


def cut_off(rank: int, world_size: int, servers) -> list[float]:
    """Server 1 dies in mid-push: how soon the last server's worker knows, in seconds."""
    weights, _ = large_weights(rank, world_size, seed=5)
    transfer, clients = CollectiveTransfer(weights, 1_000_000), clients_of(servers, 240.0)
    assert push(transfer, 1, clients) == ""
    if rank == 0:
        clients[1]._call("POST", "/misbehave", json={"dies_after": 2})
    begin = time.monotonic()
    assert "server 1" in push(transfer, 2, clients)
    while rank == 0 and not clients[4]._ask("errors", list, "GET", "/held")[0]:
        assert time.monotonic() - begin < 120.0
        time.sleep(0.1)
    dist.barrier()
    return time.monotonic() - begin


def test_a_death_is_known_at_the_end_of_the_chain_long_before_the_timeout():
    with receivers(*[1] * 5) as servers:
        assert max(run_ranks(cut_off, 1, servers)) < 120.0


def refused(rank: int, world_size: int, servers) -> tuple[str, str]:
    weights, expected = large_weights(rank, world_size, seed=6)
    transfer, clients = CollectiveTransfer(weights, 1_000_000), clients_of(servers)
    clients[0]._call("POST", "/misbehave", json={"refuses_to_join": True})
    dist.barrier()
    first = push(transfer, 1, clients)
    dist.barrier()
    clients[0]._call("POST", "/misbehave", json={})
    dist.barrier()
    second = push(transfer, 2, clients)
    if rank == 0:
        assert held(clients[0]) == [expected] * 2
    return first, second


def test_a_server_one_of_whose_workers_refused_can_join_later():
    with receivers(2) as servers:
        for first, second in run_ranks(refused, 2, servers):
            assert first.startswith("RolloutError: server 0 (") and "worker 0: ValueError: another model" in first
            assert second == ""


def failing_rank(rank: int, world_size: int, servers, how: str) -> tuple[str, float, str]:
    weights, expected = large_weights(rank, world_size, seed=7)
    transfer, clients = CollectiveTransfer(weights, 1_000_000), clients_of(servers)
    pack, reach = transfer._pack, collective.reach

    def packed(index: int) -> None:
        if index >= (0 if how == "prepare" else 5):
            raise RuntimeError("no memory")
        pack(index)

    if rank == 1 and how == "store":
        collective.reach = lambda name, address, *others: reach(name, "127.0.0.9", *others)
    elif rank == 1:
        transfer._pack = packed
    begin = time.monotonic()
    first = push(transfer, 1, clients)
    seconds = time.monotonic() - begin
    transfer._pack, collective.reach = pack, reach
    second = push(transfer, 2, clients)
    if rank == 0:
        assert [held(client) for client in clients] == [[expected]] * 2
    dist.barrier()
    return first, seconds, second


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("store", f"rank 1 of the trainer on {socket.gethostname()} does not reach the trainer at 127.0.0.9:"),
        ("prepare", "rank 1 of the trainer: RuntimeError: no memory"),
        ("send", "rank 1 of the trainer: RuntimeError: no memory"),
    ],
)
def test_an_error_of_one_rank_is_every_ranks_error_and_the_cause(how, part):
    with receivers(1, 1) as servers:
        told = run_ranks(failing_rank, 2, servers, how)
    for first, seconds, second in told:
        assert first.startswith(f"WeightSyncError: {part}"), first
        assert seconds < TIMEOUT_S / 2 and second == ""


def restarted(rank: int, world_size: int, servers) -> list[str]:
    weights, expected = large_weights(rank, world_size, seed=2)
    transfer, told = CollectiveTransfer(weights, 1_000_000), []
    joins = 0

    def counted(*arguments):
        nonlocal joins
        joins += 1
        return join(*arguments)

    join, collective.attend = collective.attend, counted
    for version, chosen in ((1, servers[:2]), (2, servers[:2]), (3, [servers[0], servers[2]]), (4, servers[:1])):
        told.append(push(transfer, version, clients_of(chosen)))
        if rank == 0:
            assert [held(client) for client in clients_of(chosen)] == [[expected]] * len(chosen)
    dist.barrier()
    assert joins == 3  # not for the second push
    return told


def test_a_restarted_server_joins_at_the_next_push():
    with receivers(1, 1, 1) as servers:
        assert run_ranks(restarted, 2, servers) == [[""] * 4] * 2


def unreachable(rank: int, world_size: int, servers, how: str) -> tuple[str, float]:
    weights, _ = large_weights(rank, world_size, seed=3)
    transfer, clients = CollectiveTransfer(weights, 1_000_000), clients_of(servers, SHORT_S)
    if how == "address" and rank == 0:  # server 1 is told another address than the store's
        invite = transfer._invite

        def invited(*arguments):
            told = invite(*arguments)
            told[1].address = "127.0.0.9"
            return told

        transfer._invite = invited
    if how == "stopped" and rank == 0:
        workers = [client.workers() for client in clients]
        for client, count in zip(clients, workers, strict=True):
            client.workers = lambda count=count: count
            client.weight_version = lambda: "default"
        os.kill(servers[1][1], signal.SIGSTOP)
    begin = time.monotonic()
    return push(transfer, 1, clients), time.monotonic() - begin


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        (
            "address",
            ["worker 0 of server 1", f"on {socket.gethostname()} does not reach the trainer at 127.0.0.9:", "firewall"],
        ),
        ("stopped", ["did not form a group: worker 0 of server 1 (http", "did not come within 5 s"]),
    ],
)
def test_whoever_does_not_come_is_named_in_time(how, parts):
    with receivers(1, 1) as servers:
        told = run_ranks(unreachable, 2, servers, how)
    for error, seconds in told:
        assert all(part in error for part in parts), error
        assert "\n" not in error and seconds < SHORT_S
