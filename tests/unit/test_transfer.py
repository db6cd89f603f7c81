"""How weights get into servers on GPUs: the choice, what servers are started with, and what happens when one fails.

The transfers themselves are in tests/multiproc/test_collective_transfer.py and tests/engine.
"""

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import EXPERTS, SIZES
from transfer_double import packed_and_assembled
from transformers import Qwen3MoeConfig

from rlad_megatron.config import LayoutConfig, ModelConfig, RolloutConfig, RunConfig, validate
from rlad_megatron.config.placement import check_one_machine, place, server_devices
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import ConfigError, WeightSyncError
from rlad_megatron.launch.local import run_local
from rlad_megatron.models.box import Box
from rlad_megatron.models.gathered import GatheredWeights, TensorMetadata
from rlad_megatron.models.registry import as_model_spec
from rlad_megatron.models.shard_plan import build_shard_plan, check_replayed_model
from rlad_megatron.parallel.place import place_of
from rlad_megatron.servers import process as server
from rlad_megatron.servers.client import ServerClient, ServerDownError
from rlad_megatron.servers.transfer import weights_file
from rlad_megatron.servers.transfer.buckets import (
    Assembly,
    Cargo,
    bucket_size,
    check_tiling,
    first_difference,
    merged_order,
    tensors_from_bytes,
    tensors_to_bytes,
)
from rlad_megatron.servers.transfer.choice import ON_CPUS, TransferChoice, check_transfer, choose_transfer
from rlad_megatron.servers.transfer.ipc import Servers, buffer_bytes
from rlad_megatron.servers.transfer.membership import (
    Meeting,
    MembershipError,
    address_towards,
    attend,
    without_loopback,
)
from rlad_megatron.servers.transfer.receiver import Invitation, Receiver
from rlad_megatron.servers.transfer.shared_memory import create_file


def run(*overrides):
    config = load_run("kk_qwen3_0p6b_from_8b", list(overrides))
    validate(config)
    return config


IPV6 = [["::1"], ["::1", "127.0.0.1"]]
COLOCATED = ("rollout.colocate=true", "train.ranks_per_node=8", "rollout.servers=4")
CPUS = ("train.gpus_per_node=0",)


@pytest.mark.parametrize(
    ("overrides", "cuda", "expected"),
    [
        ((), True, TransferChoice("collective", 0)),
        ((), False, ON_CPUS),
        (CPUS, True, ON_CPUS),
        (COLOCATED, True, TransferChoice("ipc", 2)),
        (COLOCATED, False, ON_CPUS),
        ((*COLOCATED, "rollout.sleep_level=1"), True, TransferChoice("ipc", 1)),
        ((*COLOCATED, "rollout.sleep_level=0"), True, TransferChoice("ipc", 0)),
        ((*COLOCATED, "rollout.weight_transfer=shared_memory"), True, TransferChoice("shared_memory", 2)),
        (("rollout.weight_transfer=shared_memory",), True, TransferChoice("shared_memory", 0)),
        (("rollout.urls=['http://n1:1']",), True, TransferChoice("collective", 0)),
        (("rollout.urls=['http://n1:1']", *CPUS), False, TransferChoice("collective", 0)),
        (("rollout.urls=['http://127.0.0.1:1','http://localhost:2']", *CPUS), False, ON_CPUS),
        (("rollout.urls=['http://127.0.0.1:1']", "train.nodes=2", *CPUS), False, TransferChoice("collective", 0)),
        (("rollout.nodes=1", *CPUS), False, TransferChoice("collective", 0)),
        (("train.nodes=2", *CPUS), False, TransferChoice("collective", 0)),
        (("rollout.weight_transfer=collective", *CPUS), False, TransferChoice("collective", 0)),
    ],
)
def test_the_transport_follows_from_configuration_and_devices(overrides, cuda, expected):
    assert choose_transfer(run(*overrides), cuda) == expected


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["rollout.weight_transfer=rdma"],
            ["weight_transfer=rdma is unknown", "auto, shared_memory, collective, ipc"],
        ),
        (["rollout.sleep_level=3"], ["rollout.sleep_level=3", "[0, 2]"]),
        (["rollout.weight_transfer=ipc", *CPUS], ["weight_transfer=ipc", "gpus_per_node=0", "weight_transfer=auto"]),
        (
            ["rollout.weight_transfer=collective", *COLOCATED],
            ["weight_transfer=collective", "rollout.colocate=true", "auto"],
        ),
        (["rollout.weight_bucket_mb=0"], ["rollout.weight_bucket_mb=0", "above 0"]),
        (["rollout.weight_transfer=ipc"], ["weight_transfer=ipc", "use rollout.colocate=true"]),
        ([*COLOCATED, "rollout.urls=['http://n1:1']"], ["rollout.colocate=true", "rollout.urls", "one of the two"]),
    ],
)
def test_what_no_device_can_do_is_one_line(overrides, parts):
    with pytest.raises(ConfigError) as caught:
        run(*overrides)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_machine_without_cuda_is_named():
    config = run(*COLOCATED, "rollout.weight_transfer=ipc")
    check_transfer(config, True, {})
    check_transfer(run(), False, {})
    with pytest.raises(ConfigError, match="rollout.weight_transfer=ipc .*torch finds none here.*auto"):
        check_transfer(config, False, {})


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_do_not_go_with_ipc(name):
    expandable = {name: "max_split_size_mb:512, expandable_segments:True"}
    with pytest.raises(ConfigError, match=f"^{name}=max.*True: .*pidfd_getfd.*weight_transfer=shared_memory") as caught:
        check_transfer(run(*COLOCATED), True, expandable)
    assert "\n" not in str(caught.value)
    check_transfer(run(*COLOCATED), True, {name: "expandable_segments:False"})
    for overrides, cuda in (((), True), ((*COLOCATED, "rollout.weight_transfer=shared_memory"), True), ((), False)):
        check_transfer(run(*overrides), cuda, expandable)


def start_of(monkeypatch, transfer, devices="3", cuda=True, **options):
    monkeypatch.setattr(server, "read_token", lambda file: "secret")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    launch = server.own_server(
        RolloutConfig(gpu_memory_utilization=0.4),
        0,
        model_path="m",
        max_model_len=8,
        run_dir=Path("r"),
        seed=0,
        devices=devices,
        transfer=transfer,
        token_file=Path("token"),
        **options,
    ).launch
    return launch.command, launch.environment


def test_servers_are_started_for_the_transport(monkeypatch):
    for transfer, sleeps, pickles in (
        (TransferChoice("collective", 0), False, False),
        (TransferChoice("ipc", 2), True, True),
        (TransferChoice("ipc", 0), False, True),
        (TransferChoice("shared_memory", 1), True, False),
    ):
        command, environment = start_of(monkeypatch, transfer)
        backend = command[command.index("--weight-transfer-config") + 1]
        assert backend == f'{{"backend": "{transfer.backend}"}}'
        assert ("--enable-sleep-mode" in command) == sleeps
        assert (environment.get("VLLM_ALLOW_INSECURE_SERIALIZATION") == "1") == pickles
        assert environment["CUDA_VISIBLE_DEVICES"] == "3"
        assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment  # Megatron's, not vLLM's
        assert "PYTORCH_ALLOC_CONF" not in environment  # the ranks'; a server that sleeps would refuse it


def test_servers_on_one_machine_talk_on_the_loopback(monkeypatch):
    _, environment = start_of(monkeypatch, ON_CPUS)
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"


def test_threads_on_cpus_sleep_while_they_wait_unless_told_to_spin(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert "OMP_WAIT_POLICY" not in start_of(monkeypatch, ON_CPUS, cuda=True)[1]
    assert start_of(monkeypatch, ON_CPUS, cuda=False)[1]["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert start_of(monkeypatch, ON_CPUS, cuda=False)[1]["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_file_of_somebody_else_under_the_name_is_passed_over(tmp_path, monkeypatch):
    """Only its owner can remove a file in /dev/shm. A folder cannot be removed as a file either."""
    monkeypatch.setattr(weights_file, "MEMORY_DIR", tmp_path / "memory")
    run_dir = tmp_path / "run"
    first, second = weights_file.possible_files(run_dir)
    first.mkdir(parents=True)
    run_dir.mkdir()
    assert create_file(run_dir, 10) == second and second.stat().st_size == 10
    second.with_suffix(".tmp").touch()  # not complete
    weights_file.remove(weights_file.all_files(run_dir))
    assert first.is_dir() and not list(run_dir.iterdir())
    second.mkdir()
    with pytest.raises(WeightSyncError, match="no room for .* weights .*memory: Is a directory; .*run: Is a directory"):
        create_file(run_dir, 10)


def test_servers_on_cpus_do_not_split_prefills(monkeypatch):
    flags = {"--no-enable-chunked-prefill", "--max-num-batched-tokens", "--block-size"}
    assert not flags & set(start_of(monkeypatch, ON_CPUS)[0]), "GPUs keep vLLM's defaults"
    command, _ = start_of(monkeypatch, ON_CPUS, cuda=False)
    assert flags < set(command)
    assert server.cpu_step_tokens(8, 256) == 2048
    assert server.cpu_step_tokens(2040, 8) == 2048
    assert server.cpu_step_tokens(2040, 9) == 2049  # the longest prefill, and a token of each running request
    assert server.cpu_step_tokens(8, 5000) > 5000


def test_a_kv_cache_must_hold_one_request(monkeypatch):
    """Of 33 tokens: two blocks of 32 tokens, and the one that vLLM keeps."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    server.check_kv_cache(RolloutConfig(kv_cache_gb=3 * 32 / 1024), 33, 2**20)
    server.check_kv_cache(RolloutConfig(kv_cache_gb=2 * 32 / 1024), 32, 2**20)
    small = RolloutConfig(kv_cache_gb=0.093)
    with pytest.raises(ConfigError, match=r"^rollout.kv_cache_gb=0.093: .* 33 tokens .* use at least 0.0938$"):
        server.check_kv_cache(small, 33, 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    server.check_kv_cache(small, 33, 2**20)


def test_router_replay_needs_experts_and_servers_that_return_them(monkeypatch):
    asked = RolloutConfig(router_replay=True)
    config = RunConfig(student=ModelConfig("folder"), rollout=asked)
    dense = as_model_spec({"model_type": "qwen3", **SIZES})
    check_replayed_model(config, as_model_spec({"model_type": "qwen3_moe", **SIZES, **EXPERTS}))
    check_replayed_model(RunConfig(), dense)
    said = r"^rollout.router_replay=true, .* no experts \(student.path=folder is a qwen3 model\); use .*=false$"
    with pytest.raises(ConfigError, match=said):
        check_replayed_model(config, dense)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    server.check_router_replay(asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    server.check_router_replay(RolloutConfig())
    server.check_router_replay(replace(asked, urls=("http://127.0.0.1:8400",)))
    with pytest.raises(ConfigError, match="^rollout.router_replay=true, but .* on CPUs .*; use .*=false, or .* GPUs$"):
        server.check_router_replay(asked)
    for returns in (False, True):
        command, _ = start_of(monkeypatch, ON_CPUS, returns_experts=returns)
        assert ("--enable-return-routed-experts" in command) == returns


EIGHT = [str(index) for index in range(8)]


def test_each_local_server_gets_its_own_devices():
    shared = run("train.ranks_per_node=4", "rollout.servers=2", "rollout.tensor_parallel=2")
    assert server_devices(shared, EIGHT) == ["4,5", "6,7"]
    assert server_devices(shared, [f"GPU-{name}" for name in "abcdefgh"]) == ["GPU-e,GPU-f", "GPU-g,GPU-h"]
    assert server_devices(shared, EIGHT, alone=True) == ["0,1", "2,3"]
    assert server_devices(shared, EIGHT[:4], alone=True) == ["0,1", "2,3"]
    assert server_devices(run(*COLOCATED), EIGHT) == ["0", "1", "2", "3"]
    assert server_devices(shared, []) is None  # CPUs
    assert server_devices(run(*CPUS), EIGHT) is None
    # A rank binds to the device of its place, as LOCAL_RANK says.
    assert [task.gpus for task in place(shared) if task.role == "trainer"] == [(0,), (1,), (2,), (3,)]


def test_a_machine_with_too_few_devices_is_named():
    config = run("train.ranks_per_node=4", "rollout.servers=2", "rollout.tensor_parallel=2")
    with pytest.raises(ConfigError, match=r"ranks_per_node=4 and .*servers=2 .* take 8 GPUs, .* shows 7 .*colocate"):
        server_devices(config, EIGHT[:7])
    alone = r"^rollout.servers=2 of rollout.tensor_parallel=2 take 4 GPUs, .* shows {}.*; use {}$"
    for shown, remedy in ((3, "rollout.servers=1"), (1, "a smaller rollout.tensor_parallel")):
        with pytest.raises(ConfigError, match=alone.format(shown, remedy)):
            server_devices(config, EIGHT[:shown], alone=True)


@pytest.mark.parametrize("asked", ["rollout.nodes=1", "train.nodes=2", "teacher.nodes=3"])
def test_nodes_of_a_cluster_need_a_cluster(asked):
    check_one_machine(run())
    check_one_machine(run("rollout.nodes=1", "objective.name=cross_entropy"))  # which has no servers
    with pytest.raises(
        ConfigError, match=f"^{asked}, but .*; submit .* use {asked[:-1]}[01] on a machine with 8 GPUs$"
    ):
        check_one_machine(run(asked, "teacher.ranks_per_node=1"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_on_gpus_needs_one():
    with pytest.raises(ConfigError, match="train.gpus_per_node=8, but torch finds no GPU .* use train.gpus_per_node=0"):
        run_local("train", run())


def test_a_buffer_holds_the_largest_tensor():
    small = TensorMetadata("norm", torch.bfloat16, (4096,))
    head = TensorMetadata("lm_head.weight", torch.bfloat16, (151_936, 4096))
    assert buffer_bytes([small], 1000) == 8192 and buffer_bytes([small], 10_000) == 10_000
    assert buffer_bytes([small, head], 10_000) == 151_936 * 4096 * 2 > 2**30


def test_the_trainers_address_is_that_of_the_way_to_the_server():
    assert address_towards("127.0.0.1", 8377) == "127.0.0.1"
    assert address_towards("localhost") == "127.0.0.1"


def test_a_loopback_address_is_not_told_if_there_is_another():
    assert without_loopback(["127.0.0.1", "::1"]) == ["127.0.0.1", "::1"]
    assert without_loopback(["127.0.0.1", "10.0.0.5", "10.1.0.5"]) == ["10.0.0.5", "10.0.0.5", "10.1.0.5"]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["127.0.0.1", "127.0.0.2"]]
    + [pytest.param(several, marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6")) for several in IPV6],
)
def test_members_meet_at_each_address(addresses):
    meeting = Meeting(addresses)
    names = [f"m{rank}" for rank in range(len(addresses))]
    with ThreadPoolExecutor() as pool:
        met = [
            pool.submit(attend, name, address, meeting.port, 20.0, {0: rank}, len(names) - 1)
            for rank, (name, address) in enumerate(zip(names, addresses, strict=True))
        ]
        meeting.gather(names, 20.0, lambda: False)
        own = [future.result()[1] for future in met]
    assert own == ["::1" if ":" in address else "127.0.0.1" for address in addresses]


def test_both_ends_of_a_way_that_is_closed_are_named():
    meeting = Meeting(["127.0.0.1"])
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for key, value in (("place 0 1", f"127.0.0.1 {port} worker 3"), ("member worker 3", "")):
        meeting.store.set(key, value)
    with ThreadPoolExecutor() as pool:
        met = pool.submit(attend, "worker 2", "127.0.0.1", meeting.port, 20.0, {0: 0}, 1)
        said = r"worker 2 at 127.0.0.1 does not reach worker 3 at 127.0.0.1 \(.*refused\); see the firewalls"
        with pytest.raises(MembershipError, match=f"^{said}"):
            meeting.gather(["worker 2", "worker 3"], 20.0, lambda: False)
        with pytest.raises(MembershipError, match=f"^broken off: {said}"):
            met.result()


def test_who_did_not_come_is_named_with_the_time_that_was_waited():
    meeting = Meeting(["127.0.0.1"])
    with pytest.raises(MembershipError, match="^a, b did not come within 0 s$"):
        meeting.gather(["a", "b"], 60.0, lambda: True)


def test_a_worker_on_another_kind_of_device_is_refused():
    told = Invitation("127.0.0.1", 1, "server 1", 0, 1, 1, 1, 100, "cuda", 1.0, 1.0)
    with pytest.raises(
        MembershipError, match="^the trainer's weights are on cuda, and worker 0 of server 1 is on cpu;"
    ):
        Receiver(told, 0, torch.device("cpu"))


class Client(ServerClient):
    """A server that answers from here; `bad` names the routes that it refuses."""

    def __init__(self, index, bad=()):
        super().__init__(index, f"http://n{index}", timeout_s=60.0)
        self.bad, self.called = bad, []

    def _call(self, method, route, *, params=None, json=None):
        self.called.append(route)
        if route in self.bad:
            raise ServerDownError(f"{self.name} answered 500 on {route}: no")
        return {}


def test_a_server_that_fails_is_left_out_and_named():
    good, bad = Client(0), Client(1, bad=["/update_weights"])
    servers = Servers([good, bad], 7)
    servers.start_weight_update()
    servers.update_weights({"names": []})
    servers.finish_weight_update()
    assert good.called == ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert bad.called == ["/start_weight_update", "/update_weights"]
    with pytest.raises(ServerDownError, match=r"server 1 \(http://n1\) answered 500 on /update_weights"):
        servers.raise_errors()


def test_vllm_is_not_imported_before_a_transfer():
    source = (Path(server.__file__).parent / "transfer" / "ipc.py").read_text()
    assert not [line for line in source.splitlines() if line.startswith(("import vllm", "from vllm"))]


METADATA = [TensorMetadata("a", torch.bfloat16, (7, 4)), TensorMetadata("b", torch.float32, (5,))]


@pytest.mark.parametrize("limit", [1, 8, 24, 30, 40, 1000])
def test_buckets_cover_every_slice_once_within_their_size(limit):
    slices = [(0, Box(((0, 3), (0, 4)))), (0, Box(((3, 7), (0, 4)))), (1, Box(((0, 5),)))]
    assert tensors_from_bytes(tensors_to_bytes(METADATA)) == METADATA
    cargo = Cargo.from_bytes(Cargo(METADATA, slices).to_bytes(), METADATA)
    assert cargo == Cargo(METADATA, slices)
    covered = [[] for _ in slices]
    for bucket in cargo.buckets(limit):
        end = 0
        for part in bucket:
            assert part.start >= end and part.start % 16 == 0
            end = part.start + part.size
            assert part.size == part.box.numel * METADATA[slices[part.slice][0]].dtype.itemsize
            covered[part.slice] += range(*part.box[0])
            assert part.box[1:] == slices[part.slice][1][1:]
        assert end == bucket_size(bucket) <= max(limit, 8), "a row is the least that travels"
    assert covered == [list(range(*box[0])) for _, box in slices]
    assert len(cargo.buckets(1000)) == 1 and len(cargo.buckets(1)) == 7 + 5


def test_owners_go_through_their_shares_at_one_pace():
    order = list(merged_order([4, 2, 1]))
    assert order == [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (0, 3)]


def test_a_tensor_is_whole_when_its_last_part_is_there():
    assembly = Assembly(METADATA, torch.device("cpu"))
    values = torch.arange(28.0).view(7, 4).bfloat16()
    assert assembly.add(0, Box(((3, 7), (0, 4))), values[3:]) is None
    name, whole = assembly.add(1, Box(((0, 5),)), torch.ones(5))
    assert name == "b" and torch.equal(whole, torch.ones(5))
    name, whole = assembly.add(0, Box(((0, 3), (0, 4))), values[:3])
    assert name == "a" and torch.equal(whole, values) and not assembly._begun


def test_lists_of_tensors_differ_at_the_first_difference():
    assert first_difference(METADATA, METADATA) == ""
    other = [METADATA[0], TensorMetadata("b", torch.float32, (6,))]
    assert first_difference(METADATA, other) == "b [5] float32 against b [6] float32"
    assert first_difference(METADATA, METADATA[:1]) == "b [5] float32 against nothing"
    whole = Cargo(METADATA, [(0, Box.whole((7, 4))), (1, Box.whole((5,)))])
    check_tiling(METADATA, [whole])
    with pytest.raises(ValueError, match=r"send 5 elements of a \[7, 4\] bfloat16"):
        check_tiling(METADATA, [Cargo(METADATA, [(0, Box(((0, 1), (0, 5)))), (1, Box.whole((5,)))])])


@pytest.mark.parametrize("bucket_bytes", [3_000, 100_000_000])
def test_sharded_experts_arrive_whole(bucket_bytes):
    """Ranks of TP 2, PP 2 and EP 2 with a mixture of experts, whose gate and up projections are fused."""
    spec = Qwen3MoeConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=203,
    )
    plan = build_shard_plan(spec, LayoutConfig(2, 2, expert_parallel=2))
    random = torch.Generator().manual_seed(0)
    hf = {name: torch.randn(shape, generator=random).bfloat16() for name, shape in plan.hf_shapes.items()}
    owners = []
    for rank in range(8):
        entries = plan.entries(place_of(rank, plan.layout, 8))
        parameters = {entry.name: torch.zeros(entry.shape) for entry in entries}
        for entry in entries:
            for piece in entry.pieces:
                local = parameters[entry.name][piece.local_slices.slices]
                local.copy_(hf[piece.hf_name][piece.hf_slices.slices])
        owners.append(GatheredWeights(entries, parameters, plan.hf_shapes, dtype=torch.bfloat16))
    found = dict(packed_and_assembled(owners, bucket_bytes))
    assert found.keys() == hf.keys() and "model.layers.2.mlp.experts.3.down_proj.weight" in found
    for name, tensor in found.items():
        assert torch.equal(tensor, hf[name]), name
