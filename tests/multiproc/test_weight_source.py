"""The trainer's side of weight sync on two gloo ranks, without a server."""

from __future__ import annotations

import ctypes
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file

from rlad_megatron.errors import RolloutError, WeightSyncError
from rlad_megatron.models.gathered import MegatronWeightSource
from rlad_megatron.models.shard_plan import Piece, ShardEntry
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.servers.fleet import GenerateResult, generate_groups, request_seed
from rlad_megatron.servers.transfer import shared_memory
from rlad_megatron.servers.transfer.shared_file import SharedFileTrainerEngine
from rlad_megatron.servers.transfer.shared_memory import SharedMemoryTrainerEngine, shares_memory, version_text
from rlad_megatron.types import Prompt, Rollout

pytestmark = pytest.mark.multiproc

SHAPES = {"embed": (6, 4), "norm": (5,), "q": (4, 3), "k": (2, 3)}


def whole(name: str) -> torch.Tensor:
    seed = sorted(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def make_source(rank: int, group: dist.ProcessGroup | None, *, dtype=torch.float32, is_writer: bool = True):
    """Rank 0 and 1 as two tensor-parallel ranks: embed by rows (padded to 8), norm replicated, q and k fused."""
    rows = (0, 4) if rank == 0 else (4, 6)
    embed = torch.zeros(4, 4)
    embed[: rows[1] - rows[0]] = whole("embed")[rows[0] : rows[1]]
    qkv = torch.cat([whole("q")[2 * rank : 2 * rank + 2], whole("k")[rank : rank + 1]])
    parameters = {"local.embed": embed, "local.norm": whole("norm"), "local.qkv": qkv}
    entries = [
        ShardEntry("local.embed", (4, 4), (Piece("embed", (rows, (0, 4)), ((0, rows[1] - rows[0]), (0, 4))),), True),
        ShardEntry("local.norm", (5,), (Piece("norm", ((0, 5),), ((0, 5),)),), rank == 0),
        ShardEntry(
            "local.qkv",
            (3, 3),
            (
                Piece("q", ((2 * rank, 2 * rank + 2), (0, 3)), ((0, 2), (0, 3))),
                Piece("k", ((rank, rank + 1), (0, 3)), ((2, 3), (0, 3))),
            ),
            True,
        ),
    ]
    source = MegatronWeightSource(entries, parameters, SHAPES, dtype=dtype, is_writer=is_writer, group=group)
    return source, parameters


def iterate(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    source, parameters = make_source(rank, dist.group.WORLD, dtype=torch.bfloat16)
    described = [(tensor.name, tensor.shape, tensor.dtype) for tensor in source.metadata()]
    first = dict(source)
    assert described == [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in first.items()]
    for parameter in parameters.values():
        parameter.mul_(2)  # the optimizer works in place
    return dict(source)


def test_iteration_gives_the_present_whole_tensors_on_every_rank():
    for tensors in run_ranks(iterate, 2):
        assert list(tensors) == list(SHAPES)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, (2 * whole(name)).bfloat16()), name


def test_a_second_copy_of_the_model_adds_nothing():
    source, _ = make_source(0, None, is_writer=False)  # data-parallel rank 1
    for name, tensor in source:
        assert torch.equal(tensor, torch.zeros(SHAPES[name])), name


def write_file(rank: int, world_size: int, run_dir: Path) -> None:
    source, parameters = make_source(rank, dist.group.WORLD)
    engine = SharedMemoryTrainerEngine(source=source, run_dir=run_dir, is_sender=rank == 0)
    engine.write(7)
    for version in (7, 8):
        loaded = load_file(engine.path)
        assert set(loaded) == set(SHAPES)
        for name, tensor in loaded.items():
            assert torch.equal(tensor, whole(name) * (version - 6)), (version, name)
        with safe_open(engine.path, framework="pt") as file:
            assert file.metadata() == {shared_memory.VERSION_KEY: version_text(version)}
        dist.barrier()
        if version == 7:
            for parameter in parameters.values():
                parameter.mul_(2)
            engine.write(8)
    dist.barrier()
    engine.shutdown()
    engine.shutdown()
    dist.barrier()
    assert not engine.path.exists()


def test_the_file_is_safetensors_and_is_rewritten_in_place(tmp_path):
    run_ranks(write_file, 2, tmp_path)


def write_shared_file(rank: int, world_size: int, run_dir: Path) -> None:
    assert shares_memory(["http://127.0.0.1:1", f"http://{socket.gethostname()}:2"], dist.group.WORLD)
    assert not shares_memory(["http://127.0.0.1:1", "http://192.0.2.1:2"] if rank == 0 else [], dist.group.WORLD)
    source, parameters = make_source(rank, dist.group.WORLD, dtype=torch.bfloat16)
    engine = SharedFileTrainerEngine(source=source, run_dir=run_dir)
    engine.write(7)
    with safe_open(engine.path, framework="pt") as before:  # a reader that is late keeps a whole old version
        for parameter in parameters.values():
            parameter.mul_(2)
        dist.barrier()
        engine.write(8)
        for version, tensors in ((7, {name: before.get_tensor(name) for name in SHAPES}), (8, load_file(engine.path))):
            assert set(tensors) == set(SHAPES)
            for name, tensor in tensors.items():
                assert torch.equal(tensor, (whole(name) * (version - 6)).bfloat16()), (version, name)
    with safe_open(engine.path, framework="pt") as file:
        assert file.metadata() == {shared_memory.VERSION_KEY: version_text(8)}
    assert list(run_dir.iterdir()) == [engine.path]
    dist.barrier()
    engine.shutdown()


def test_other_hosts_get_a_new_file_for_each_version(tmp_path):
    run_ranks(write_shared_file, 2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    source, _ = make_source(0, None)
    engine = SharedFileTrainerEngine(source=source, run_dir=tmp_path / "missing")
    with pytest.raises(WeightSyncError, match="missing/.*safetensors: .*runs_dir"):
        engine.write(1)


def test_without_dev_shm_the_run_folder_holds_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "MEMORY_DIR", tmp_path / "missing")
    source, _ = make_source(0, None)
    engine = SharedMemoryTrainerEngine(source=source, run_dir=tmp_path)
    assert engine.path.parent == tmp_path
    engine.shutdown()
    with pytest.raises(WeightSyncError, match=r"no room for .* GiB of weights"):
        shared_memory._create(tmp_path / "also-missing", 10)


def test_vllms_factory_builds_the_engine_and_drives_a_round(tmp_path):
    vllm_factory = pytest.importorskip("vllm.distributed.weight_transfer.factory")
    from rlad_megatron.servers.transfer.vllm_plugin import register

    register()
    register()
    calls = []

    class Client:
        def start_weight_update(self):
            calls.append("start")

        def update_weights(self, update_info):
            assert set(load_file(update_info["path"])) == set(SHAPES)
            calls.append(("update", update_info["version"]))

        def finish_weight_update(self, weight_version=None):
            calls.append(("finish", weight_version))

    engine = vllm_factory.WeightTransferTrainerFactory.trainer_init(
        shared_memory.SharedMemoryTrainerInitInfo(rank=0, run_dir=tmp_path),
        client=Client(),
        source=make_source(0, None)[0],
    )
    engine.send_weights()
    engine.shutdown()
    assert calls == ["start", ("update", 0), ("finish", "0")]


class FlakyEngine:
    """Loses server 1 and the second prompt in its first call."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []

    def generate(self, prompts, group_size, sampling, *, seed, weight_version, indices):
        self.indices.append(list(indices))
        groups = [
            [Rollout(prompt, [request_seed(seed, index, m) % 99], [-1.0], "stop", weight_version) for m in range(2)]
            for prompt, index in zip(prompts, indices, strict=True)
        ]
        if len(self.indices) == 1:
            groups[1] = None
            return GenerateResult(groups, [1])
        return GenerateResult(groups, [])


def follow(rank: int, world_size: int) -> tuple[list[list[int]], list[list[int]]]:
    engine = FlakyEngine() if rank == 0 else None
    pushed = []

    def push(servers: list[int]) -> None:
        pushed.append(servers)
        dist.barrier()  # a collective: all ranks must be here together

    prompts = [Prompt(str(i), (i,), "", "", "") for i in range(3)]
    groups = generate_groups(
        engine, prompts, 2, None, seed=3, weight_version=5, push_weights=push, group=dist.group.WORLD
    )
    if engine is not None:
        assert engine.indices == [[0, 1, 2], [1]]
    assert [[rollout.prompt.id for rollout in members] for members in groups] == [["0", "0"], ["1", "1"], ["2", "2"]]
    return pushed, [[rollout.tokens[0] for rollout in members] for members in groups]


def test_all_ranks_push_to_restarted_servers_and_get_the_same_rollouts():
    results = run_ranks(follow, 2)
    expected = [[request_seed(3, index, member) % 99 for member in range(2)] for index in range(3)]
    assert results == [([[1]], expected)] * 2


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
