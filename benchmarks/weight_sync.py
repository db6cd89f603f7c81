"""How long a push of weights takes: shared memory on one host, and the collective transfer between hosts.

    python benchmarks/weight_sync.py            (as root: it makes network namespaces)

"shared_memory": a random Llama of 135 M parameters in float32 (0.54 GB) into a real vLLM server, from the first byte
packed to the resumed server, against a memcpy of the same bytes, warm, by one thread. The split is measured in the same
pushes: in the trainer around its calls, in the worker around vLLM's repacking and around its waits for fingerprints,
which a thread takes meanwhile ("proof").

"collective": a random Llama of 67 MB in float32, from owners to receivers, each on a host of its own whose link has 200
Mbit/s in either direction. Receivers run the worker's receiving code (receiver_server.py); "vllm" are two real servers.
All figures of a round follow each other. A push is measured from the first byte packed to the last receiver's answer;
the group exists already. "copy over one link" is one HTTP request with the same bytes. With two owners on two hosts,
the receiver's link has 400 Mbit/s, as a host with two network cards has, also for the figure of one owner that it is
compared with; with equal links the receiver's own link is the limit ("same link").

Ratios are medians over rounds. `receivers_8_over_link` is over size / bandwidth. `peak_over_two_buckets` is the
trainer's peak of resident memory in a push, above that before it, over the size of two buckets. Results go to
benchmarks/results/weight_sync.json and weight_sync.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import measure
import torch
import torch.distributed as dist
from network import DEVICE, Network, on_host
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlad_megatron.config import ModelConfig, RolloutConfig, RunConfig
from rlad_megatron.models.box import Box
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.models.shard_plan import Piece, ShardEntry
from rlad_megatron.parallel.ports import free_port
from rlad_megatron.secret import TOKEN_FILE, read_token, shared_token
from rlad_megatron.servers.client import ServerClient
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.process import HOST, VllmServer, own_server
from rlad_megatron.servers.transfer.choice import COLLECTIVE, TransferChoice
from rlad_megatron.servers.transfer.collective import CollectiveTransfer

RESULT = Path(__file__).parent / "results" / "weight_sync.json"
HERE = Path(__file__).parent
MBIT = 200.0
BUCKET_MB = 16.0
RECEIVERS = (1, 2, 4, 8)
TIMEOUT_S = 300.0
WARM_UP = 4  # pushes, until the server uses memory again that it has used before
TOKEN = "token"  # a file
PARTS = ("shared_memory", "collective", "vllm")

Seconds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="keeps the other parts' results")
    options = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rounds: dict[str, Seconds] = result.get("rounds", {})
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        shared_token(Path(folder) / TOKEN)
        for part in options.parts:
            rounds[part] = MEASURES[part](Path(folder), options.repeats)
            print(
                part, json.dumps({name: statistics.median(values) for name, values in rounds[part].items()}, indent=2)
            )
    result = {
        "ratios": ratios(rounds),
        "rounds": rounds,
    }
    measure.write_result(RESULT, result)
    plot(rounds)
    print(json.dumps(result["ratios"], indent=2))


def ratios(rounds: dict[str, Seconds]) -> dict[str, float]:
    found = {}
    if memory := rounds.get("shared_memory"):
        found["shared_memory_over_memcpy"] = measure.median_ratio(memory["push"], memory["memcpy"])
    if hosts := rounds.get("collective"):
        link = [hosts["bytes"][0] * 8 / (MBIT * 1e6)] * len(hosts["8 receivers"])
        found["receivers_8_over_1"] = measure.median_ratio(hosts["8 receivers"], hosts["1 receiver"])
        found["receivers_8_over_link"] = measure.median_ratio(hosts["8 receivers"], link)
        found["owners_2_over_1"] = measure.median_ratio(hosts["2 owners"], hosts["1 owner"])
        found["owners_2_over_1_same_link"] = measure.median_ratio(hosts["2 owners, same link"], hosts["1 receiver"])
        found["peak_over_two_buckets"] = statistics.median(hosts["peak bytes"]) / (2 * BUCKET_MB * 1e6)
    if real := rounds.get("vllm"):
        found["vllm_2_over_link"] = measure.median_ratio(
            real["2 vLLM servers"], [real["bytes"][0] * 8 / (MBIT * 1e6)] * len(real["2 vLLM servers"])
        )
    return {name: round(value, 3) for name, value in found.items()}


# Shared memory.


def measure_shared_memory(folder: Path, repeats: int) -> Seconds:
    model = write_model(folder / "large", LARGE)
    config = RunConfig(
        student=ModelConfig(precision="fp32"),
        rollout=RolloutConfig(dtype="float32", kv_cache_gb=0.3, max_concurrency=4, port=free_port(HOST, os.getpid())),
    )
    student = SimpleNamespace(weights=weights_of(model))
    seconds: Seconds = {}
    fleet = ServerFleet(config, model_path=str(model), max_model_len=256, eos_ids=[], run_dir=folder, student=student)
    timed_worker(fleet)
    source, target = (torch.ones(weights_bytes(student.weights), dtype=torch.uint8) for _ in range(2))
    torch.set_num_threads(1)
    with fleet:
        client = fleet.clients[0]
        split = Split(fleet, client)
        for round_ in range(-WARM_UP, repeats):
            before = time.perf_counter()
            target.copy_(source)
            memcpy = time.perf_counter() - before
            figures = split.push(round_ + WARM_UP)
            if round_ >= 0:
                for name, value in ({"memcpy": memcpy} | figures).items():
                    seconds.setdefault(name, []).append(value)
    return seconds


def timed_worker(fleet: ServerFleet) -> None:
    """Start servers with a worker that says how long its parts take (timed_worker.py)."""
    make = fleet._own_server

    def made(index: int, token_file: Path) -> VllmServer:
        server = make(index, token_file)
        assert server.launch is not None
        command = server.launch.command
        command[command.index("--worker-extension-cls") + 1] = "timed_worker.TimedWorker"
        return server

    fleet._own_server = made


class Split:
    """Measures the parts of a push."""

    def __init__(self, fleet: ServerFleet, client: ServerClient) -> None:
        self.fleet, self.client = fleet, client
        self.spent: dict[str, float] = {}
        transfer = fleet._pusher.transfer
        transfer.prepare = self._timed("packing", transfer.prepare)
        for name in ("pause", "start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"):
            setattr(client, name, self._timed(name, getattr(client, name)))
        for name in ("resume", "weight_version", "call_workers"):
            setattr(client, name, self._timed(name, getattr(client, name)))
        fleet._student.weights.fingerprints = self._timed("trainer's fingerprints", fleet._student.weights.fingerprints)

    def push(self, version: int) -> dict[str, float]:
        self.spent = {}
        metrics = self.fleet._pusher.send(self.fleet.servers, version)
        spent = self.spent
        inside = self.client.call_workers("take_times")[0]
        proof = inside["proof"]
        push = metrics["sync/seconds"] - spent["trainer's fingerprints"]
        loading = sum(spent[name] for name in ("start_weight_update", "update_weights", "finish_weight_update"))
        figures = {
            "push": push,
            "packing": spent["packing"],
            "loading": inside["update"] - inside["repacking"] - proof,
            "vLLM's repacking": inside["repacking"],
            "proof": proof,
            "calls": push - spent["packing"] - inside["update"],
        }
        assert loading >= inside["update"]
        return figures | {
            "trainer's fingerprints": spent["trainer's fingerprints"],
            "pause": metrics["sync/pause_seconds"],
        }

    def _timed(self, name: str, action: Callable) -> Callable:
        def timed(*arguments, **named):
            begin = time.perf_counter()
            try:
                return action(*arguments, **named)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - begin

        return timed


# Between hosts.


def measure_collective(folder: Path, repeats: int) -> Seconds:
    hosts = [f"receiver{index}" for index in range(max(RECEIVERS))]
    network = Network(dict.fromkeys(["owner0", "owner1", *hosts], MBIT) | {"wide": 2 * MBIT})
    with ExitStack() as stack:
        stack.enter_context(network)
        urls = [stack.enter_context(receiver(network, host)) for host in [*hosts, "wide"]]
        return push_from_owners(write_model(folder / "small", SMALL), folder, repeats, urls)


def measure_vllm(folder: Path, repeats: int) -> Seconds:
    """Two real servers, of the same model."""
    hosts = ["server0", "server1"]
    model = write_model(folder / "small", SMALL)
    network = Network(dict.fromkeys(["owner0", "owner1", *hosts], MBIT))
    with ExitStack() as stack:
        stack.enter_context(network)
        servers = [vllm_server(network, host, index, model, folder) for index, host in enumerate(hosts)]
        for server in servers:
            stack.callback(server.stop)
            server.start()
        # They listen in namespaces that this process cannot reach; an owner waits for them.
        return push_from_owners(model, folder, repeats, [server.client.url for server in servers])


def push_from_owners(model: Path, folder: Path, repeats: int, urls: Sequence[str]) -> Seconds:
    """Run the owners on their hosts; returns what rank 0 measured."""
    told = folder / f"owners_{len(urls)}.json"
    ranks, environment = [], os.environ | {"GLOO_SOCKET_IFNAME": DEVICE, TOKEN_FILE: str(folder / TOKEN)}
    for rank in range(2):
        arguments = ["rank", str(rank), str(folder / f"store_{len(urls)}"), str(model), str(repeats), str(told), *urls]
        command = on_host(f"owner{rank}", [sys.executable, str(HERE / "weight_sync.py"), *arguments])
        ranks.append(subprocess.Popen(command, env=environment))
    for process in ranks:
        if process.wait() != 0:
            for other in ranks:
                other.kill()
            raise SystemExit("an owner failed")
    return json.loads(told.read_text())


def run_rank(rank: int, store: str, model: str, repeats: int, told: str, *urls: str) -> None:
    """An owner. Rank 1 holds nothing where one owner sends."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    token = read_token(Path(os.environ[TOKEN_FILE]))
    clients = [ServerClient(index, url, TIMEOUT_S, token) for index, url in enumerate(urls)]
    while rank == 0 and not all(client.healthy() for client in clients):
        time.sleep(1.0)
    dist.barrier()
    alone, both = (weights_of(Path(model), rank, owners, dist.group.WORLD) for owners in (1, 2))
    cells: dict[str, tuple[GatheredWeights, list[ServerClient]]] = {}
    if len(urls) == 2:
        cells["2 vLLM servers"] = alone, clients
    else:
        for count in RECEIVERS:
            cells[f"{count} receiver{'s' * (count > 1)}"] = alone, clients[:count]
        cells["2 owners, same link"] = both, clients[:1]
        cells["1 owner"] = alone, clients[-1:]
        cells["2 owners"] = both, clients[-1:]
    seconds: Seconds = {"bytes": [weights_bytes(alone)]}
    for round_ in range(-1, repeats):
        for name, (weights, chosen) in cells.items():
            transfer = CollectiveTransfer(weights, int(BUCKET_MB * 1e6))
            push(transfer, 1, chosen)  # forms the group
            dist.barrier()
            peak = measure.peak_bytes(lambda transfer=transfer, chosen=chosen: push(transfer, 2, chosen))
            value = elapsed(partial(push, transfer, 3, chosen))
            transfer.close()
            if rank == 0 and round_ >= 0:
                seconds.setdefault(name, []).append(value)
                print(f"{name}: {value:.3f} s", flush=True)
                if name == "8 receivers":
                    seconds.setdefault("peak bytes", []).append(float(peak))
        if rank == 0 and round_ >= 0 and len(urls) > 2:
            data = bytes(weights_bytes(alone))
            value = elapsed(lambda data=data: httpx.post(f"{urls[0]}/sink", content=data, timeout=TIMEOUT_S))
            seconds.setdefault("copy over one link", []).append(value)
        dist.barrier()
    if rank == 0:
        Path(told).write_text(json.dumps(seconds))
    dist.barrier()


def push(transfer: CollectiveTransfer, version: int, clients: Sequence[ServerClient]) -> None:
    transfer.prepare(version, clients)
    transfer.send(version, clients)


def elapsed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


@contextmanager
def receiver(network: Network, host: str) -> Iterator[str]:
    command = [sys.executable, str(HERE / "receiver_server.py"), network.address[host], "1"]
    process = subprocess.Popen(on_host(host, command), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def vllm_server(network: Network, host: str, index: int, model: Path, folder: Path) -> VllmServer:
    server = own_server(
        RolloutConfig(dtype="float32", kv_cache_gb=0.1, max_concurrency=4, servers=2),
        index,
        model_path=str(model),
        max_model_len=256,
        run_dir=folder,
        seed=0,
        devices=None,
        transfer=TransferChoice(COLLECTIVE, sleep_level=0),
        token_file=folder / TOKEN,
        host=network.address[host],
        port=8377,
    )
    assert server.launch is not None
    server.launch.command[:] = on_host(host, server.launch.command)
    return server


# Models.


LARGE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152}
LARGE |= {"num_attention_heads": 9, "num_key_value_heads": 3}
SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "vocab_size": 8192}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 8}


def write_model(folder: Path, sizes: dict[str, int]) -> Path:
    config = LlamaConfig(**sizes, max_position_embeddings=512, tie_word_embeddings=True)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def weights_of(model: Path, rank: int = 0, owners: int = 1, group: dist.ProcessGroup | None = None) -> GatheredWeights:
    """A model of which each owner holds a band of rows of every matrix, and the first one the vectors."""
    entries, parameters, shapes = [], {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        shapes[name] = tuple(tensor.shape)
        if rank < (owners if tensor.dim() == 2 else 1):
            rows = tensor.shape[0]
            start, stop = (rank * rows // owners, (rank + 1) * rows // owners) if tensor.dim() == 2 else (0, rows)
            parameters[name] = tensor[start:stop].clone()
            box = Box(((start, stop), *((0, size) for size in tensor.shape[1:])))
            piece = Piece(name, box, Box.whole(parameters[name].shape))
            entries.append(ShardEntry(name, tuple(parameters[name].shape), (piece,), True))
    return GatheredWeights(entries, parameters, shapes, dtype=torch.float32, group=group)


def weights_bytes(weights: GatheredWeights) -> int:
    return sum(tensor.nbytes for tensor in weights.metadata())


def plot(rounds: dict[str, Seconds]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    if memory := rounds.get("shared_memory"):
        base = statistics.median(memory["memcpy"])
        parts = {n: memory[n] for n in ("packing", "loading", "vLLM's repacking", "proof", "calls")}
        start = 0.0
        for name, values in parts.items():
            left.barh(["push"], [statistics.median(values)], left=start, label=name)
            start += statistics.median(values)
        left.barh(["memcpy"], [base], color="grey")
        left.barh(["8 x memcpy"], [8 * base], color="lightgrey")
        left.set_title("Shared memory, 0.54 GB into a vLLM server")
        left.set_xlabel("seconds")
        left.legend(frameon=False)
    if hosts := rounds.get("collective"):
        times = [statistics.median(hosts[f"{count} receiver{'s' * (count > 1)}"]) for count in RECEIVERS]
        right.plot(RECEIVERS, times, "o-", label="push, 1 owner")
        right.axhline(hosts["bytes"][0] * 8 / (MBIT * 1e6), color="grey", ls=":", label="size / bandwidth")
        right.set_ylim(bottom=0)
        right.set_xticks(RECEIVERS)
        right.set_title(f"Collective over gloo, {hosts['bytes'][0] / 1e6:.0f} MB, links of {MBIT:g} Mbit/s")
        right.set_xlabel("receivers, each on a host of its own")
        right.set_ylabel("seconds")
        right.legend(frameon=False)
    figure.savefig(RESULT.with_suffix(".png"), dpi=130)


MEASURES = {"shared_memory": measure_shared_memory, "collective": measure_collective, "vllm": measure_vllm}

if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank, store, model, repeats, told, *urls = sys.argv[2:]
        run_rank(int(rank), store, model, int(repeats), told, *urls)
    else:
        main()
