"""What it costs a server on CPUs that other processes use its cores, and what OpenMP's wait policy changes.

    python benchmarks/busy_cores.py

Two servers of the demo, each with a thread for every core (a run leaves one to the API servers): `passive`, whose
threads sleep while they wait, as those of every server of a run do, and `default`, whose threads spin first. They
decode the same prompts in turn, on idle cores and beside a process that keeps one core busy. The ratios, passive to
default, are medians over rounds, with the smallest and the largest: a thread that spins loses little or very much, as
the kernel places it. Results go to benchmarks/results/busy_cores.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import measure
from server_start import PROMPT, change_environment, demo_server

from rlad_megatron.launch.scratch import scratch
from rlad_megatron.servers.client import ServerClient
from rlad_megatron.servers.sampling import decode_greedily

RESULT = Path(__file__).parent / "results" / "busy_cores.json"
POLICIES = {"passive": "PASSIVE", "default": None}
PROMPTS, TOKENS = 32, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    options = parser.parse_args()
    with ExitStack() as stack:
        clients = stack.enter_context(_servers(stack.enter_context(scratch())))
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        stack.callback(other.kill)
        other.send_signal(signal.SIGSTOP)

        def decode(client: ServerClient) -> None:
            decode_greedily([client], [PROMPT] * PROMPTS, TOKENS)

        def decode_beside(client: ServerClient) -> None:
            other.send_signal(signal.SIGCONT)
            decode(client)
            other.send_signal(signal.SIGSTOP)

        actions = {f"{name}_idle": lambda client=client: decode(client) for name, client in clients.items()}
        actions |= {f"{name}_busy": lambda client=client: decode_beside(client) for name, client in clients.items()}
        seconds = measure.paired_seconds(actions, options.repeats)
    ratios = {cores: _summary(seconds[f"passive_{cores}"], seconds[f"default_{cores}"]) for cores in ("idle", "busy")}
    rounds = {name: [round(value, 3) for value in values] for name, values in seconds.items()}
    measure.write_result(RESULT, {"ratios": ratios, "rounds": rounds})
    print(json.dumps(ratios, indent=2))


def _summary(passive: list[float], default: list[float]) -> dict[str, float]:
    """Of the ratios of all rounds."""
    ratios = sorted(ours / other for ours, other in zip(passive, default, strict=True))
    found = {"median": statistics.median(ratios), "smallest": ratios[0], "largest": ratios[-1]}
    return {name: round(value, 3) for name, value in found.items()}


@contextmanager
def _servers(folder: Path) -> Iterator[dict[str, ServerClient]]:
    threads = str(len(os.sched_getaffinity(0)))
    servers = {name: demo_server(folder, index) for index, name in enumerate(POLICIES)}
    with ExitStack() as stack:
        for name, server in servers.items():
            change_environment(server, OMP_NUM_THREADS=threads, OMP_WAIT_POLICY=POLICIES[name])
            stack.callback(server.stop)
            server.start()
        for server in servers.values():
            server.wait_ready()
        yield {name: server.client for name, server in servers.items()}


if __name__ == "__main__":
    main()
