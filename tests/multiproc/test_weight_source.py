"""The trainer's side of weight sync on two gloo ranks, without a server."""

from __future__ import annotations

import ctypes
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from scripted_server import ScriptedServer

from rlad_megatron.config import RunConfig, SamplingConfig
from rlad_megatron.errors import RolloutError, StepDropped, WeightSyncError
from rlad_megatron.models.box import Box
from rlad_megatron.models.fingerprint import fingerprint
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.models.shard_plan import Piece, ShardEntry
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.sampling import request_seed
from rlad_megatron.servers.transfer import weights_file
from rlad_megatron.servers.transfer.shared_memory import SharedMemoryTransfer, create_file, shares_memory
from rlad_megatron.servers.transfer.weights_file import VERSION_KEY, version_text
from rlad_megatron.types import EVALUATION, Prompt

pytestmark = pytest.mark.multiproc

SHAPES = {"embed": (6, 4), "norm": (5,), "q": (4, 3), "k": (2, 3)}


def whole(name: str) -> torch.Tensor:
    seed = sorted(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def make_weights(rank: int, group: dist.ProcessGroup | None, *, dtype=torch.float32, is_owner: bool = True):
    """Rank 0 and 1 as two tensor-parallel ranks: embed by rows (padded to 8), norm replicated, q and k fused."""
    rows = (0, 4) if rank == 0 else (4, 6)
    embed = torch.zeros(4, 4)
    embed[: rows[1] - rows[0]] = whole("embed")[rows[0] : rows[1]]
    qkv = torch.cat([whole("q")[2 * rank : 2 * rank + 2], whole("k")[rank : rank + 1]])
    parameters = {"local.embed": embed, "local.norm": whole("norm"), "local.qkv": qkv}
    entries = [
        ShardEntry(
            "local.embed", (4, 4), (Piece("embed", Box((rows, (0, 4))), Box.whole((rows[1] - rows[0], 4))),), True
        ),
        ShardEntry("local.norm", (5,), (Piece("norm", Box.whole((5,)), Box.whole((5,))),), rank == 0),
        ShardEntry(
            "local.qkv",
            (3, 3),
            (
                Piece("q", Box.at((2 * rank, 0), (2, 3)), Box.whole((2, 3))),
                Piece("k", Box.at((rank, 0), (1, 3)), Box.at((2, 0), (1, 3))),
            ),
            True,
        ),
    ]
    entries = [replace(entry, owner=entry.owner and is_owner) for entry in entries]
    weights = GatheredWeights(entries, parameters, SHAPES, dtype=dtype, group=group)
    return weights, parameters


def iterate(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    weights, parameters = make_weights(rank, dist.group.WORLD, dtype=torch.bfloat16)
    described = [(tensor.name, tensor.shape, tensor.dtype) for tensor in weights.metadata()]
    first = dict(weights)
    assert described == [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in first.items()]
    for parameter in parameters.values():
        parameter.mul_(2)  # the optimizer works in place
    return dict(weights)


def test_iteration_gives_the_present_whole_tensors_on_every_rank():
    for tensors in run_ranks(iterate, 2):
        assert list(tensors) == list(SHAPES)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, (2 * whole(name)).bfloat16()), name


def fingerprints(rank: int, world_size: int) -> dict[str, int]:
    return make_weights(rank, dist.group.WORLD, dtype=torch.bfloat16)[0].fingerprints()


def test_fingerprints_are_those_of_the_whole_tensors_on_every_rank():
    expected = {name: fingerprint(whole(name).bfloat16()).item() for name in SHAPES}
    assert run_ranks(fingerprints, 2) == [expected] * 2


def test_a_second_copy_of_the_model_adds_nothing():
    weights, _ = make_weights(0, None, is_owner=False)  # data-parallel rank 1
    assert set(weights.fingerprints().values()) == {0}
    for name, tensor in weights:
        assert torch.equal(tensor, torch.zeros(SHAPES[name])), name


def write_file(rank: int, world_size: int, run_dir: Path) -> None:
    weights, parameters = make_weights(rank, dist.group.WORLD)
    transfer = SharedMemoryTransfer(weights, run_dir)
    transfer.write(7)
    for version in (7, 8):
        loaded = load_file(transfer.path)
        assert set(loaded) == set(SHAPES)
        for name, tensor in loaded.items():
            assert torch.equal(tensor, whole(name) * (version - 6)), (version, name)
        with safe_open(transfer.path, framework="pt") as file:
            assert file.metadata() == {VERSION_KEY: version_text(version)}
        dist.barrier()
        if version == 7:
            for parameter in parameters.values():
                parameter.mul_(2)
            transfer.write(8)
    dist.barrier()
    weights_file.remove([transfer.path])


def test_the_file_is_safetensors_and_is_rewritten_in_place(tmp_path):
    run_ranks(write_file, 2, tmp_path)


def who_shares_memory(rank: int, world_size: int) -> tuple[bool, bool]:
    own = shares_memory(["http://127.0.0.1:1", f"http://{socket.gethostname()}:2"], dist.group.WORLD)
    return own, shares_memory(["http://127.0.0.1:1", "http://192.0.2.1:2"] if rank == 0 else [], dist.group.WORLD)


def test_only_one_host_shares_memory():
    assert run_ranks(who_shares_memory, 2) == [(True, False)] * 2


def test_without_dev_shm_the_run_folder_holds_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_file, "MEMORY_DIR", tmp_path / "missing")
    weights, _ = make_weights(0, None)
    transfer = SharedMemoryTransfer(weights, tmp_path)
    assert transfer.path.parent == tmp_path
    with pytest.raises(WeightSyncError, match=r"no room for .* GiB of weights"):
        create_file(tmp_path / "also-missing", 10)


class ScriptedPusher:
    """Notes what is pushed to which servers."""

    def __init__(self, pushed: list[tuple[int | str, list[int]]]) -> None:
        self.pushed = pushed

    def prove(self, servers, version) -> None:
        self._note(servers, "canary")

    def send(self, servers, version) -> None:
        self._note(servers, version)

    def _note(self, servers, what) -> None:
        self.pushed.append((what, [server.index for server in servers]))
        dist.barrier()  # a collective: all ranks must be here together


class ScriptedFleet(ServerFleet):
    """Two servers; `dies_after` says how many members each answers before it dies for the first time."""

    def __init__(self, *dies_after: int | None) -> None:
        super().__init__(
            RunConfig(),
            model_path="unused",
            max_model_len=1,
            eos_ids=[],
            run_dir=Path("unused"),
            student=SimpleNamespace(weights=make_weights(dist.get_rank(), dist.group.WORLD)[0]),
        )
        self.pushed: list[tuple[int | str, list[int]]] = []
        self.servers = [ScriptedServer(f"server {i}", i, dies_after=after) for i, after in enumerate(dies_after)]

    def _start(self, stack):
        return []

    def _open_pusher(self, student, stack):
        return ScriptedPusher(self.pushed)


def follow(rank: int, world_size: int, dies_after: list[int | None]):
    with ScriptedFleet(*dies_after) as fleet:
        fleet.push(0)
        fleet.pushed.clear()
        groups = fleet.generate([Prompt(str(i), (i,), "", "", "") for i in range(6)], 2, SamplingConfig(), batch=3)
        in_round = fleet.pushed.copy()
        fleet.pushed.clear()
        fleet.push(0)
    assert [[rollout.prompt.id for rollout in members] for members in groups] == [[str(i)] * 2 for i in range(6)]
    return in_round, fleet.pushed, [[rollout.tokens[1] for rollout in members] for members in groups]


@pytest.mark.parametrize(
    ("dies_after", "in_round", "after"),
    [
        ([None, 1], [], [("canary", [1]), (0, [0, 1])]),
        ([2, 1], [("canary", [0, 1]), (0, [0, 1])], [(0, [0, 1])]),
    ],
    ids=["one of two dies", "both die"],
)
def test_servers_that_die_come_back_with_the_weights_and_all_ranks_get_the_same_rollouts(dies_after, in_round, after):
    results = run_ranks(follow, 2, dies_after)
    expected = [[request_seed(3, index, member) for member in range(2)] for index in range(6)]
    assert results == [(in_round, after, expected)] * 2


def drop_an_evaluation(rank: int, world_size: int) -> None:
    with ScriptedFleet(None) as fleet:
        fleet.push(0)
        fleet._drop_requested = lambda: True
        with pytest.raises(StepDropped):
            fleet.generate([Prompt("a", (1,), "", "", "")], 2, SamplingConfig(), batch=EVALUATION)


def test_a_run_that_is_told_to_stop_drops_an_evaluation_too():
    run_ranks(drop_an_evaluation, 2)


def fail(rank: int, world_size: int) -> list[str]:
    def known() -> None:
        raise RolloutError("server 3 is gone; see its log")

    def unpicklable() -> None:
        error = RuntimeError("strange")
        error.pointer = ctypes.pointer(ctypes.c_int(0))
        raise error

    texts = []
    for action in (known, unpicklable):
        try:
            on_first_rank(action, dist.group.WORLD)
        except (RolloutError, RuntimeError) as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_an_error_of_rank_0_reaches_all_ranks():
    first, second = run_ranks(fail, 2)
    assert first == ["RolloutError: server 3 is gone; see its log", "RuntimeError: strange"]
    assert second[0] == first[0]
    # Not an error of the user's: it stays one with a traceback, and says where on rank 0 it came from.
    assert second[1].startswith("RuntimeError: RuntimeError: strange\nOn rank 0:\nTraceback")
