"""What a sampled token costs between the engine and rank 0: our route against vLLM's completions route.

    python benchmarks/rollout_path.py

Measures CPU seconds per million tokens of two processes: rank 0's client, which is this one, and vLLM's API server, the
front end. Both paths run in turn against the same server, in every round. The server is vLLM's own, with its scheduler
and its messages between processes; only the model is replaced (memory_worker.py), in the engine's process, which is not
measured. "before" is the client that this package had, with one request to `/v1/completions` for each response; "route"
is `ServerClient.sample`, with one request for each group of 8.

Requests are replaced as they end, so their number stays the same. Responses of 50 tokens all run at the same time. Of
those of 30,000 tokens 16 do, and the others wait in the server: so many tokens are enough to measure. The engine gives
at most 17,000 tokens a second.

`cpu_per_token_over_before` is that of rank 0, and `front_end_over_before` that of the front end: the largest, over
numbers of requests and lengths, of the median over rounds. Results go to benchmarks/results/rollout_path.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import measure
import psutil
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlad_megatron.config import RolloutConfig, SamplingConfig
from rlad_megatron.parallel.ports import free_port
from rlad_megatron.secret import shared_token
from rlad_megatron.servers.client import DIRECT, ServerClient, open_session
from rlad_megatron.servers.frames import Completion
from rlad_megatron.servers.process import HOST, VllmServer, own_server
from rlad_megatron.servers.sampling import request_seed, sampling_body
from rlad_megatron.servers.transfer.choice import ON_CPUS

RESULT = Path(__file__).parent / "results" / "rollout_path.json"
GROUP = 8
PROMPT = list(range(64))
IN_FLIGHT = (64, 256, 1024)
RUNNING = {50: max(IN_FLIGHT), 30_000: 16}  # by the length of a response
TOKENS = {50: 160_000, 30_000: 16 * 30_000}  # to measure: whole responses, because those of one start end together
TIMEOUT_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    rounds: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _write_model(Path(folder) / "model")
        for length, running in RUNNING.items():
            with _server(model, Path(folder), length, running) as server:
                for repeat in range(options.repeats):
                    for in_flight in IN_FLIGHT:
                        cell = rounds.setdefault(f"{in_flight} in flight, {length} tokens", {})
                        for path in list(PATHS)[:: 1 if repeat % 2 else -1]:
                            seconds = asyncio.run(Load(server, path, in_flight, length).measure())
                            for process, value in seconds.items():
                                cell.setdefault(path, {}).setdefault(process, []).append(value)
                            print(f"{in_flight} in flight, {length} tokens, {path}: {seconds}", flush=True)
    ratios = {
        name: round(max(measure.median_ratio(cell["route"][who], cell["before"][who]) for cell in rounds.values()), 3)
        for name, who in (("cpu_per_token_over_before", "rank 0"), ("front_end_over_before", "front end"))
    }
    result = {
        "ratios": ratios,
        "rounds": rounds,
    }
    measure.write_result(RESULT, result)
    print(json.dumps(ratios, indent=2))


def _write_model(folder: Path) -> Path:
    """As small as vLLM takes it, with a vocabulary of the usual size."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 151_936}
    Qwen3ForCausalLM(Qwen3Config(**sizes, max_position_embeddings=32_768)).save_pretrained(folder)
    return folder


@contextmanager
def _server(model: Path, folder: Path, length: int, running: int) -> Iterator[VllmServer]:
    config = RolloutConfig(dtype="float32", kv_cache_gb=0.5, max_concurrency=running)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    token_file = folder / "token"
    shared_token(token_file)
    server = own_server(
        config,
        0,
        model_path=str(model),
        max_model_len=len(PROMPT) + length,
        run_dir=folder,
        seed=0,
        devices=None,
        transfer=ON_CPUS,
        token_file=token_file,
        port=free_port(HOST, os.getpid()),
    )
    server.launch.command.extend(["--worker-cls", "memory_worker.MemoryWorker"])
    server.client.timeout_s = TIMEOUT_S
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


async def _before(client: ServerClient, session: httpx.AsyncClient, sampling: SamplingConfig, seed: int) -> int:
    """The client before our route: one response, by vLLM's completions route. Returns how many there are."""
    body = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens}
    body |= {"prompt": list(PROMPT), "seed": request_seed(0, seed, 0), "stop_token_ids": [7], "ignore_eos": True}
    body |= {"logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}
    response = (await session.post(client.url + "/v1/completions", json=body)).raise_for_status()
    choice = response.json()["choices"][0]
    tokens, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    assert len(tokens) == len(log_probs)
    Completion(tokens, log_probs, choice["finish_reason"], [])
    return 1


async def _route(client: ServerClient, session: httpx.AsyncClient, sampling: SamplingConfig, seed: int) -> int:
    body = sampling_body(PROMPT, sampling, [request_seed(0, seed, member) for member in range(GROUP)], [7])
    return len([completion async for _, completion in client.sample(session, body)])


PATHS = {"before": (_before, 1), "route": (_route, GROUP)}  # and the responses to a request


class Load:
    """A number of responses in flight at a server, by one path."""

    def __init__(self, server: VllmServer, path: str, in_flight: int, length: int) -> None:
        self.server, self.in_flight, self.length = server, in_flight, length
        self.ask, self.group = PATHS[path]
        self.done, self.loops = 0, list[asyncio.Task]()
        (self.front_end,) = psutil.Process(server._supervisor.pid).children()

    async def measure(self) -> dict[str, float]:
        """CPU seconds per million tokens of both processes."""
        sampling = SamplingConfig(max_tokens=self.length)
        async with open_session(TIMEOUT_S) as session:
            seeds = range(self.in_flight // self.group)
            self.loops = [asyncio.create_task(self._loop(session, sampling, seed)) for seed in seeds]
            if self.length == min(RUNNING):
                await self._wait_for(lambda: self.done >= self.in_flight)
            else:  # before any of them ends
                await self._wait_for(lambda: self._requests() == self.in_flight)
            before, cpu = self.done, self._cpu()
            await self._wait_for(lambda: (self.done - before) * self.length >= TOKENS[self.length])
            millions = (self.done - before) * self.length / 1e6
            seconds = {who: round((now - cpu[who]) / millions, 3) for who, now in self._cpu().items()}
            for loop in self.loops:
                loop.cancel()
            await asyncio.wait(self.loops)
            self.loops = []
        await self._wait_for(lambda: self._requests() == 0)
        return seconds

    async def _loop(self, session: httpx.AsyncClient, sampling: SamplingConfig, seed: int) -> None:
        while True:
            try:
                answered = await self.ask(self.server.client, session, sampling, seed)
            except httpx.ReadError:  # the server closed an idle connection as it was taken
                continue
            self.done += answered  # read after the wait: other loops add to it too

    async def _wait_for(self, fact) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not fact():
            for loop in self.loops:
                assert not loop.done(), loop.result()
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    def _requests(self) -> int:
        lines = httpx.get(
            f"{self.server.client.url}/metrics", timeout=TIMEOUT_S, headers=self.server.client._headers, **DIRECT
        ).text.splitlines()
        names = "vllm:num_requests_running{", "vllm:num_requests_waiting{"
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(names))

    def _cpu(self) -> dict[str, float]:
        times = self.front_end.cpu_times()
        return {"rank 0": time.process_time(), "front end": times.user + times.system}


if __name__ == "__main__":
    main()
