"""Weights through vLLM's own IPC engine, trainer's and worker's, over our weights: all but the CUDA calls.

Two trainer ranks as processes; the servers' worker engines live in the first rank's process, behind the same client
and JSON as over HTTP. Replaced are streams (by none), and handles of a GPU's memory (by those of shared memory between
the ranks).
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from safetensors.torch import load_file
from tiny_servers import HfStudent, write_checkpoint

from rlad_megatron.config import RolloutConfig
from rlad_megatron.errors import RladError
from rlad_megatron.models.gathered import TensorMetadata
from rlad_megatron.servers.client import UNPUSHED, ServerClient, ServerDownError
from rlad_megatron.servers.transfer.choice import TransferChoice
from rlad_megatron.servers.transfer.ipc import IpcTransfer

pytestmark = pytest.mark.engine

SMALL_BUCKET = 20_000  # bytes; the model has 0.3 MB, its largest tensor 0.05


class Model:
    """What a worker loads weights into."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.loads: list[int] = []  # tensors of each call

    def load_weights(self, weights) -> None:
        weights = list(weights)
        self.loads.append(len(weights))
        for name, tensor in weights:
            assert name not in self.weights, f"{name} came twice"
            self.weights[name] = tensor.clone()


class InProcessServer(ServerClient):
    """A server whose workers are vLLM's engines in this process, one for each GPU."""

    def __init__(self, index: int, gpus: list[int]) -> None:
        super().__init__(index, f"http://127.0.0.1:{index + 1}", timeout_s=120.0)
        self.gpus = gpus
        self.fails = False  # at the next update
        self.start()

    def start(self) -> None:
        """A new process: nothing of the old one is left."""
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        self.version, self.routes = UNPUSHED, []
        self.models = [Model() for _ in self.gpus]
        self.engines = []
        for rank, (gpu, model) in enumerate(zip(self.gpus, self.models, strict=True)):
            parallel = SimpleNamespace(data_parallel_index=0, world_size=len(self.gpus), rank=rank)
            vllm_config = SimpleNamespace(parallel_config=parallel, model_config=None)
            config = SimpleNamespace(backend="ipc")
            device = torch.device("cuda", gpu)
            self.engines.append(WeightTransferEngineFactory.create_engine(config, vllm_config, device, model))

    def forget(self) -> None:
        for model in self.models:
            model.weights.clear()
            model.loads.clear()
        self.routes.clear()

    def _call(self, method, route, *, params=None, json=None):
        self.routes.append(route)
        body = from_json(json)
        if route == "/finish_weight_update":
            self.version = body["weight_version"]
        try:
            if route == "/init_weight_transfer_engine":
                self._on_all(lambda engine: engine.init_transfer_engine(engine.parse_init_info(body["init_info"])))
            if route == "/update_weights":
                assert not self.fails, "out of memory"
                self._on_all(lambda engine: engine.update_weights(body["update_info"]))
        except Exception as error:
            raise ServerDownError(f"{self.name} answered 500 on {route}: {error!r}") from error
        return {}

    def _on_all(self, action) -> None:
        with ThreadPoolExecutor(len(self.engines)) as pool:
            list(pool.map(action, self.engines))


def from_json(body):
    return json.loads(json.dumps(body))


def shared_handle(tensor: torch.Tensor) -> tuple[None, tuple]:
    """As torch's `reduce_tensor` for CUDA: rebuild arguments, the device's index in place 6."""
    device = torch.accelerator.current_device_index()
    return None, (*(None,) * 6, device, *tensor.untyped_storage()._share_filename_cpu_())


def rebuild_shared(*arguments) -> torch.Tensor:
    storage = torch.UntypedStorage._new_shared_filename_cpu(*arguments[7:])
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def without_cuda(rank: int) -> None:
    """Let this process stand for GPU `rank`. What Megatron calls of CUDA is replaced in every rank on CPUs."""
    import torch.multiprocessing.reductions as reductions
    from vllm.distributed.weight_transfer import ipc_engine, packed_tensor

    torch.accelerator.current_device_index = lambda: rank
    torch.accelerator.synchronize = torch.cuda.ipc_collect = lambda: None
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=f"GPU-{index}")
    packed_tensor.reduce_tensor = ipc_engine.reduce_tensor = shared_handle
    reductions.rebuild_cuda_tensor = rebuild_shared
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # as the servers of this transport are started


def every_scenario(rank: int, world_size: int, folder: Path) -> dict:
    """Runs every scenario; on the first rank returns what to assert, elsewhere the errors that were raised."""
    without_cuda(rank)
    seen: dict = {"errors": []}
    weights = load_file(folder / "model.safetensors")

    def send(transfer, version, servers):
        for server in servers:
            server.forget()
        try:
            transfer.send(version, servers)
        except RladError as error:
            seen["errors"].append(str(error))

    def holds(server, expected):
        assert server.version != UNPUSHED
        for model in server.models:
            assert model.weights.keys() == expected.keys()
            assert all(torch.equal(model.weights[name], tensor) for name, tensor in expected.items())
            assert len(model.loads) > 2, "the model must not have come in one bucket"
        return server.version

    ipc = [InProcessServer(0, [1, 0]), InProcessServer(1, [1])]
    transfer = IpcTransfer(HfStudent(folder, rank, world_size, dist.group.WORLD).weights, SMALL_BUCKET)
    send(transfer, 3, ipc)
    if rank == 0:
        seen["ipc"] = [holds(server, weights) for server in ipc], [list(server.routes) for server in ipc]
        ipc[0].fails = True
    send(transfer, 4, ipc)
    if rank == 0:
        seen["ipc failure"] = ipc[0].version, holds(ipc[1], weights), list(ipc[0].routes)
    return seen | contracts(rank, world_size)


def contracts(rank: int, world_size: int) -> dict:
    """What vLLM's engines and command line take."""
    from vllm.distributed.weight_transfer.base import ParamMeta, VLLMWeightSyncClient
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from rlad_megatron.servers import process as server

    has_cuda, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    server.read_token = lambda file: "secret"
    command = server.own_server(
        RolloutConfig(),
        0,
        model_path="m",
        max_model_len=8,
        run_dir=Path("r"),
        seed=0,
        devices=None,
        transfer=TransferChoice("ipc", sleep_level=2),
        token_file=Path("token"),
    ).launch.command
    torch.cuda.is_available = has_cuda
    known, unknown = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_known_args(command[3:])

    return {
        "metadata": ([field.name for field in fields(ParamMeta)], [field.name for field in fields(TensorMetadata)]),
        "client": isinstance(ServerClient(0, "http://h", 1.0), VLLMWeightSyncClient),
        "arguments": (known.enable_sleep_mode, known.weight_transfer_config.backend, unknown),
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("transfer") / "model", seed=1, tied=False)
    return run_ranks(every_scenario, 2, folder)


def test_a_failed_update_is_every_ranks_error(ran):
    (told,) = ran[0]["errors"]
    assert ran[1]["errors"] == [told]
    assert "server 0 (http://127.0.0.1:1)" in told and "/update_weights" in told and "out of memory" in told
    version, other, routes = ran[0]["ipc failure"]
    assert (version, other) == ("3", "4") and routes[-1] == "/update_weights" and routes.count("/update_weights") == 1


def test_ipc_handles_reach_the_worker_on_the_same_gpu(ran):
    versions, routes = ran[0]["ipc"]
    assert versions == ["3", "3"]
    for called in routes:
        assert called[:2] == ["/init_weight_transfer_engine", "/start_weight_update"]
        assert set(called[2:-1]) == {"/update_weights"} and called[-1] == "/finish_weight_update"


def test_vllm_takes_what_it_is_given(ran):
    theirs, ours = ran[0]["metadata"]
    assert theirs == ours and ran[0]["client"]
    sleeps, backend, others = ran[0]["arguments"]
    assert sleeps and backend == "ipc"
    # Of the web server in front of the engine; every server of the tests is started with them.
    assert [word for word in others if word.startswith("--")] == [
        "--disable-uvicorn-access-log",
        "--host",
        "--port",
        "--middleware",
    ]
