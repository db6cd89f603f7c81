"""How long a server on CPUs takes to start and to answer first, against vLLM's own way.

    python benchmarks/server_start.py

`ours` is a server of the demo as a run starts it. `vllm` has the same options, but vLLM's own module and platform,
which spawns the engine, and torch.compile. `ready` is the time until it answers; `first_answers` that of its first
batches, of 1, 8 and 32 prompts. The ratios are medians over rounds, each with both in turn. Results go to
benchmarks/results/server_start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import measure

from rlad_megatron.config.recipe import load_run
from rlad_megatron.launch.scratch import scratch
from rlad_megatron.parallel.ports import free_port
from rlad_megatron.secret import shared_token
from rlad_megatron.servers.process import HOST, VllmServer, own_server
from rlad_megatron.servers.sampling import decode_greedily
from rlad_megatron.servers.transfer.choice import choose_transfer
from rlad_megatron.servers.vllm_plugin import FORK_ENGINE

RESULT = Path(__file__).parent / "results" / "server_start.json"
# What makes a server ours: its module, and variables.
OUR_MODULE, MODULE = "rlad_megatron.servers.api_server", "vllm.entrypoints.openai.api_server"
OUR_VARIABLES = (FORK_ENGINE, "TORCH_COMPILE_DISABLE")
PROMPT, TOKENS = list(range(5, 45)), 16
BATCHES = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    options = parser.parse_args()
    rounds: dict[str, list[float]] = {}
    with scratch() as folder:
        for round_ in range(options.repeats):
            for name in ("ours", "vllm")[:: -1 if round_ % 2 else 1]:
                for part, seconds in _start(folder, ours=name == "ours").items():
                    rounds.setdefault(f"{name}_{part}", []).append(round(seconds, 2))
    ratios = {
        part: round(measure.median_ratio(rounds[f"ours_{part}"], rounds[f"vllm_{part}"]), 3)
        for part in ("ready", "first_answers")
    }
    measure.write_result(RESULT, {"ratios": ratios, "rounds": rounds})
    print(json.dumps(ratios, indent=2))


def demo_server(folder: Path, index: int = 0) -> VllmServer:
    """A server of the demo as a run makes it, not started. folder: for logs and secret. index: of several servers."""
    config = load_run("kk_tiny_cpu", [f"rollout.port={free_port(HOST, os.getpid() + 100 * index)}"])
    token = folder / "token"
    shared_token(token)
    return own_server(
        config.rollout,
        index,
        model_path=config.student.path,
        max_model_len=256,
        run_dir=folder,
        seed=0,
        devices=None,
        transfer=choose_transfer(config, cuda=False),
        token_file=token,
        port=config.rollout.port,
    )


def change_environment(server: VllmServer, **changes: str | None) -> None:
    """Set variables of a server that is not started, or, with None, take them away."""
    assert server.launch is not None
    environment = server.launch.environment | changes
    kept = {name: value for name, value in environment.items() if value is not None}
    server.launch = replace(server.launch, environment=kept)


def _start(folder: Path, *, ours: bool) -> dict[str, float]:
    """Seconds of one server."""
    server = demo_server(folder)
    if not ours:
        assert server.launch is not None
        command = [MODULE if word == OUR_MODULE else word for word in server.launch.command]
        assert MODULE in command
        server.launch = replace(server.launch, command=command)
        change_environment(server, **dict.fromkeys(OUR_VARIABLES))
    begin = time.perf_counter()
    server.start()
    try:
        server.wait_ready()
        ready = time.perf_counter()
        for prompts in BATCHES:
            decode_greedily([server.client], [PROMPT] * prompts, TOKENS)
        return {"ready": ready - begin, "first_answers": time.perf_counter() - ready}
    finally:
        server.stop()


if __name__ == "__main__":
    main()
