"""How weights get into servers on GPUs: the choice, what servers are started with, and what happens when one fails.

The transfers themselves are in tests/engine/test_cuda_transfer.py, with vLLM.
"""

import threading
import time
from pathlib import Path

import pytest
import torch

from rlad_megatron.config import RolloutConfig, validate
from rlad_megatron.config.placement import check_one_machine, place, server_devices
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import ConfigError, WeightSyncError
from rlad_megatron.launch.local import run_local
from rlad_megatron.models.gathered import TensorMetadata
from rlad_megatron.servers import process as server
from rlad_megatron.servers.client import ServerClient, ServerDownError
from rlad_megatron.servers.transfer import weights_file
from rlad_megatron.servers.transfer.choice import ON_CPUS, TransferChoice, check_transfer, choose_transfer
from rlad_megatron.servers.transfer.cuda import BUCKET_BYTES, Servers, address_towards, bucket_bytes, within
from rlad_megatron.servers.transfer.shared_memory import create_file


def run(*overrides):
    config = load_run("kk_qwen3_0p6b_from_8b", list(overrides))
    validate(config)
    return config


COLOCATED = ("rollout.colocate=true", "train.ranks_per_node=8", "rollout.servers=4")
CPUS = ("train.gpus_per_node=0",)


@pytest.mark.parametrize(
    ("overrides", "cuda", "expected"),
    [
        ((), True, TransferChoice("nccl", 0)),
        ((), False, ON_CPUS),
        (CPUS, True, ON_CPUS),
        (COLOCATED, True, TransferChoice("ipc", 2)),
        (COLOCATED, False, ON_CPUS),
        ((*COLOCATED, "rollout.sleep_level=1"), True, TransferChoice("ipc", 1)),
        ((*COLOCATED, "rollout.sleep_level=0"), True, TransferChoice("ipc", 0)),
        ((*COLOCATED, "rollout.weight_transfer=shared_memory"), True, TransferChoice("shared_memory", 2)),
        (("rollout.weight_transfer=shared_memory",), True, TransferChoice("shared_memory", 0)),
        (("rollout.urls=['http://n1:1']",), True, TransferChoice("nccl", 0)),
    ],
)
def test_the_transport_follows_from_configuration_and_devices(overrides, cuda, expected):
    assert choose_transfer(run(*overrides), cuda) == expected


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["rollout.weight_transfer=rdma"],
            ["weight_transfer=rdma is unknown", "auto, shared_memory, nccl, ipc"],
        ),
        (["rollout.sleep_level=3"], ["rollout.sleep_level=3", "[0, 2]"]),
        (["rollout.weight_transfer=nccl", *CPUS], ["weight_transfer=nccl", "gpus_per_node=0", "weight_transfer=auto"]),
        (["rollout.weight_transfer=nccl", *COLOCATED], ["weight_transfer=nccl", "rollout.colocate=true", "auto"]),
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
    config = run("rollout.weight_transfer=nccl")
    check_transfer(config, True, {})
    check_transfer(run(), False, {})
    with pytest.raises(ConfigError, match="rollout.weight_transfer=nccl .*torch finds none here.*auto"):
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


def start_of(monkeypatch, transfer, devices="3", cuda=True):
    monkeypatch.setattr(server, "read_token", lambda file: "secret")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
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
    ).launch
    return launch.command, launch.environment


def test_servers_are_started_for_the_transport(monkeypatch):
    for transfer, sleeps, pickles in (
        (TransferChoice("nccl", 0), False, False),
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


def test_servers_on_one_machine_talk_on_the_loopback(monkeypatch):
    _, environment = start_of(monkeypatch, ON_CPUS)
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"


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


def test_a_bucket_holds_the_largest_tensor():
    small = TensorMetadata("norm", torch.bfloat16, (4096,))
    head = TensorMetadata("lm_head.weight", torch.bfloat16, (151_936, 4096))
    assert bucket_bytes([small]) == BUCKET_BYTES
    assert bucket_bytes([small, head]) == 151_936 * 4096 * 2 > 2**30


def test_the_trainers_address_is_that_of_the_way_to_the_server():
    assert address_towards("http://127.0.0.1:8377") == "127.0.0.1"
    assert address_towards("http://localhost") == "127.0.0.1"


class Client(ServerClient):
    """A server that answers from here; `bad` names the routes that it refuses, once `until` is set."""

    def __init__(self, index, bad=(), until=None):
        super().__init__(index, f"http://n{index}", timeout_s=60.0)
        self.bad, self.until, self.called = bad, until, []

    def _call(self, method, route, *, params=None, json=None):
        self.called.append(route)
        if route in self.bad:
            assert self.until.wait(60), "no caller came so far"
            raise ServerDownError(f"{self.name} answered 500 on {route}: no")
        return {}


class Communicator:
    """Waits in `broadcast` as NCCL does for a peer that does not come, if `stuck`, until it is destroyed."""

    def __init__(self, stuck=False):
        self.stuck, self.sent, self.waits, self.destroyed = stuck, 0, threading.Event(), threading.Event()

    def broadcast(self, tensor, src, stream=None):
        assert not self.destroyed.is_set(), "an ended communicator must not be used"
        if self.stuck:
            self.waits.set()
            assert self.destroyed.wait(60), "the broadcast was not ended"
        self.sent += 1

    def destroy(self):
        self.destroyed.set()


def test_a_server_that_fails_ends_its_own_broadcast_and_no_other():
    communicators = {0: Communicator(), 1: Communicator(stuck=True)}
    good, bad = Client(0), Client(1, bad=["/update_weights"], until=communicators[1].waits)
    servers = Servers([good, bad], 7, communicators)
    servers.start_weight_update()
    update = threading.Thread(target=servers.update_weights, args=({"names": []},))
    update.start()
    for _ in range(3):  # the first one waits for server 1, until its refusal ends that
        servers.broadcast(torch.zeros(1), src=0)
    update.join()
    servers.finish_weight_update()
    assert communicators[0].sent == 3 and communicators[1].sent == 1
    assert communicators[1].destroyed.is_set() and not communicators[0].destroyed.is_set()
    assert good.called == ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert bad.called == ["/start_weight_update", "/update_weights"]
    with pytest.raises(ServerDownError, match=r"server 1 \(http://n1\) answered 500 on /update_weights"):
        servers.raise_errors()


def test_an_error_of_nccl_names_the_server():
    class Broken(Communicator):
        def broadcast(self, tensor, src, stream=None):
            raise RuntimeError("NCCL error: remote process exited")

    servers = Servers([Client(0), Client(1)], 7, {0: Communicator(), 1: Broken()})
    servers.broadcast(torch.zeros(1), src=0)
    servers.broadcast(torch.zeros(1), src=0)
    with pytest.raises(WeightSyncError, match=r"server 1 .*NCCL error: remote process exited"):
        servers.raise_errors()


def test_waiting_for_a_group_has_an_end():
    assert within(10.0, lambda: 5, give_up=lambda: False) == 5
    with pytest.raises(KeyError):
        within(10.0, lambda: {}["missing"], give_up=lambda: False)
    never = threading.Event()
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="0.3 s"):
        within(0.3, never.wait, give_up=lambda: False)
    with pytest.raises(TimeoutError):
        within(60.0, never.wait, give_up=lambda: True)  # the server has refused already
    assert time.monotonic() - begin < 30
    never.set()


def test_vllm_is_not_imported_before_a_transfer():
    source = (Path(server.__file__).parent / "transfer" / "cuda.py").read_text()
    assert not [line for line in source.splitlines() if line.startswith(("import vllm", "from vllm"))]
