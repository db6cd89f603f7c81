"""The collective weight transfer into real vLLM servers."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch.distributed as dist
from harness import run_ranks
from tiny_servers import EOS, PROMPT, HfStudent, assert_matches, fleet_of, kill_engine, running, write_checkpoint

from rlad_megatron.errors import RolloutError, WeightSyncError
from rlad_megatron.servers.client import ServerClient
from rlad_megatron.servers.sampling import decode_greedily
from rlad_megatron.servers.transfer.choice import TransferChoice
from rlad_megatron.servers.transfer.collective import CollectiveTransfer

pytestmark = pytest.mark.engine

COLLECTIVE = TransferChoice("collective", sleep_level=0)


def push_from_rank(rank: int, world_size: int, folders, servers, run_dir) -> list[dict[str, float] | str]:
    """Weights of two checkpoints, then those of another model."""
    told = []
    for version, folder in enumerate(folders):
        student = HfStudent(folder, rank, world_size, dist.group.WORLD)
        with fleet_of(folder, run_dir, student, transfer=COLLECTIVE, weight_bucket_mb=0.05, **servers) as fleet:
            fleet.version = version
            try:
                told.append(fleet.push(version))
            except RolloutError as error:
                told.append(str(error))
        dist.barrier()
    return told


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two checkpoints of one model, and one of another."""
    base = tmp_path_factory.mktemp("models")
    return [write_checkpoint(base / str(seed), seed=seed, tied=seed < 3) for seed in (1, 2, 3)]


def checksums(client: ServerClient) -> dict[str, str]:
    """Of the weights as vLLM computes with them."""
    return client._ask("checksums", dict, "POST", "/weight_checker", json={"action": "checksum"})


def at_bucket(transfer: CollectiveTransfer, number: int, action: Callable[[], None]) -> None:
    """In later pushes, do this before that bucket is packed."""
    pack = transfer._pack

    def packed(index: int) -> None:
        if index == number:
            action()
        pack(index)

    transfer._pack = packed


def no_memory() -> None:
    raise RuntimeError("no memory")


def test_two_servers(folders, tmp_path):
    with fleet_of(folders[0], tmp_path / "run", transfer=COLLECTIVE, servers=2, request_timeout_s=60.0) as fleet:
        push_from_two_owners(fleet, folders, tmp_path)
        break_pushes_off(fleet, folders, tmp_path)


def push_from_two_owners(fleet, folders, tmp_path):
    """Each server decodes with the weights that were sent last, and refuses another model."""
    for told in run_ranks(push_from_rank, 2, folders, running(fleet), tmp_path):
        assert [metrics["sync/bytes"] for metrics in told[:2]] == [told[0]["sync/bytes"]] * 2
        assert 0 < told[1]["sync/pause_seconds"] <= told[1]["sync/seconds"]
        assert "the trainer sends lm_head.weight [200, 64], but the model of this server" in told[2]
    for (decoded,) in decode_greedily(fleet.clients, [PROMPT], 24):
        assert_matches(decoded, folders[1])
        assert EOS not in decoded.tokens[:-1]


def break_pushes_off(fleet, folders, tmp_path):
    """By the trainer, when the model is loaded half, and by the death of the second server. The first stays usable."""
    folder, other, _ = folders
    servers, student = running(fleet), HfStudent(folder)
    options = {"transfer": COLLECTIVE, "request_timeout_s": 60.0, "weight_bucket_mb": 0.05}
    with fleet_of(folder, tmp_path, student, **servers, **options) as pushing:
        pushing.push(1)
        first = [checksums(client) for client in fleet.clients]
        assert first[0] == first[1]
        student.load(other)
        at_bucket(pushing._pusher.transfer, 5, no_memory)
        with pytest.raises(WeightSyncError, match="^rank 0 of the trainer: RuntimeError: no memory$"):
            pushing.push(2)
        del pushing._pusher.transfer._pack
        student.load(folder)
        pushing.push(3)
        assert [checksums(client) for client in fleet.clients] == first
        for (decoded,) in decode_greedily(fleet.clients, [PROMPT], 24):
            assert_matches(decoded, folder)

        student.load(other)
        at_bucket(pushing._pusher.transfer, 5, lambda: kill_engine(fleet.servers[1]))
        begin = time.monotonic()
        with pytest.raises((RolloutError, WeightSyncError), match="server 1"):
            pushing.push(4)
        assert time.monotonic() - begin < 60.0
    servers["urls"] = servers["urls"][:1]
    with fleet_of(folder, tmp_path, HfStudent(folder), **servers, **options) as pushing:
        pushing.push(5)
        assert checksums(fleet.clients[0]) == first[0]


def test_a_server_of_two_workers_that_refused_a_model_joins_with_the_right_one(folders, tmp_path):
    folder, other, untied = folders
    options = {"transfer": COLLECTIVE, "tensor_parallel": 2, "request_timeout_s": 60.0}
    with fleet_of(folder, tmp_path / "run", **options) as fleet:
        options |= running(fleet)
        for _ in range(2):  # an answer that was not fetched would be that of the next call
            with (
                fleet_of(untied, tmp_path, HfStudent(untied), **options) as pushing,
                pytest.raises(RolloutError, match=r"server 0 .*: the trainer sends lm_head.weight \[200, 64\], but"),
            ):
                pushing.push(1)
        with fleet_of(folder, tmp_path, HfStudent(other), **options) as pushing:
            pushing.push(1)
        ((decoded,),) = decode_greedily(fleet.clients, [PROMPT], 24)
        assert_matches(decoded, other)
