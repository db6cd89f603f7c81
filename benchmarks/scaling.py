"""The time of a step as `rlad plan` estimates it, extrapolated to 4,096 GPUs. A model: no such run has been made.

    python benchmarks/scaling.py

The recipe math_r1_distill_7b_from_32b, which has 64 GPUs, with as many times the nodes, servers and prompts of a step:
each GPU's share of the work stays. Every schedule at every size, with the recipe's split.

Rank 0 is not in that estimate. Its work is counted from the code, times what is measured here on one core: a request to
a server (`ServerClient`), and a token of a response pickled and unpickled, as every rank gets all groups
(parallel/collective.py:on_first_rank). What a token costs between server and rank 0 is from rollout_path.json. gloo's
broadcast is a tree: rank 0 sends log2(ranks) copies.

Results go to benchmarks/results/scaling.json and docs/images/scaling.png; docs/scaling.md has them as tables.
"""

from __future__ import annotations

import json
import math
import pickle
import random
import statistics
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib
import measure

from rlad_megatron.config import AHEAD, PHASED, STREAMING, RunConfig
from rlad_megatron.config.placement import total_gpus
from rlad_megatron.config.recipe import load_run
from rlad_megatron.plan.count import make_plan
from rlad_megatron.plan.lengths import expected_lengths
from rlad_megatron.plan.plan import Plan
from rlad_megatron.plan.rates import rates_for
from rlad_megatron.plan.time import checkpoint_seconds, push_seconds, step_time
from rlad_megatron.servers.client import ServerClient
from rlad_megatron.servers.sampling import PROBE_PROMPTS
from rlad_megatron.types import Group, Prompt, Rollout

RESULT = Path(__file__).parent / "results" / "scaling.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "scaling.png"
RECIPE, BASE = "math_r1_distill_7b_from_32b", 64
FACTORS = (1, 8, 64)
# Of each server: for `submit` and `prepare` a weight_version each; pause, record_fingerprints, start_weight_update,
# update_weights, finish_weight_update, recorded_fingerprints, reset_prefix_cache, resume, weight_version.
REQUESTS = 2 + 9
HOST_NETWORK = 2e9  # bytes/s of gloo over TCP from one process: assumed
LONG = 10_000  # tokens of the responses that are pickled


def main() -> None:
    costs = rank_0_costs()
    sizes = {}
    for factor in FACTORS:
        config = grown(load_run(RECIPE, []), factor)
        schedules = {}
        for name, changed in variants(config).items():
            plan = make_plan(changed)
            found = step_time(plan, expected_lengths(changed), rates_for(changed, []), most_responses=10**9)
            schedules[name] = {"step_s": round(found.times["time/step"], 1)}
            schedules[name] |= {what: round(share, 3) for what, share in found.idle.items()}
            schedules[name]["tokens_per_gpu_hour"] = round(found.tokens_per_hour)
            tokens = found.tokens
        plan = make_plan(config)
        one_off = {
            "push_s": round(push_seconds(plan, rates_for(config, [])), 2),
            "checkpoint_s": round(checkpoint_seconds(plan), 1),
        }
        sizes[str(total_gpus(config))] = {"schedules": schedules, **one_off, "rank 0": rank_0(plan, tokens, costs)}
        print(total_gpus(config), json.dumps(sizes[str(total_gpus(config))], indent=2))
    result = {
        "ratios": {},
        "rounds": sizes,
        "measured": costs,
    }
    measure.write_result(RESULT, result)
    plot(sizes)


def grown(config: RunConfig, factor: int) -> RunConfig:
    rollout = config.rollout
    return replace(
        config,
        train=replace(config.train, nodes=config.train.nodes * factor),
        rollout=replace(
            rollout,
            nodes=rollout.nodes * factor,
            servers=rollout.servers * factor,
            prompts_per_step=rollout.prompts_per_step * factor,
        ),
    )


def variants(config: RunConfig) -> dict[str, RunConfig]:
    def scheduled(name: str, overprovision: int = 0) -> RunConfig:
        return replace(config, rollout=replace(config.rollout, schedule=name, overprovision=overprovision))

    return {
        "phased": scheduled(PHASED),
        "streaming": scheduled(STREAMING),
        "streaming, 1/4 more prompts": scheduled(STREAMING, config.rollout.prompts_per_step // 4),
        "ahead 1": scheduled(AHEAD),
    }


def rank_0_costs() -> dict[str, float]:
    """Seconds of CPU time on one core, and bytes."""
    answers = json.loads((RESULT.parent / "rollout_path.json").read_text())["rounds"]
    route = answers["1024 in flight, 30000 tokens"]["route"]["rank 0"]
    group = Group(0, 0, [_rollout(seed) for seed in range(8)])
    tokens = 8 * LONG
    written, read = [], []
    for _ in range(9):
        begin = time.process_time()
        content = pickle.dumps([group])
        middle = time.process_time()
        pickle.loads(content)
        written.append((middle - begin) / tokens)
        read.append((time.process_time() - middle) / tokens)
    return {
        "request_s": _request_seconds(),
        "answer_s_per_token": statistics.median(route) / 1e6,
        "pickle_s_per_token": statistics.median(written),
        "unpickle_s_per_token": statistics.median(read),
        "pickled_bytes_per_token": len(content) / tokens,
        # Lists of Python's numbers: a pointer and an int, a pointer and a float.
        "held_bytes_per_token": 8 + sys.getsizeof(150_000) + 8 + sys.getsizeof(-0.5),
    }


def _rollout(seed: int) -> Rollout:
    chance = random.Random(seed)
    tokens = [chance.randrange(150_000) for _ in range(LONG)]
    log_probs = [-chance.expovariate(2) for _ in range(LONG)]
    return Rollout(Prompt("", (), "", "", ""), tokens, log_probs, "stop", [(1, LONG)])


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"weight_version": "1"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def _request_seconds() -> float:
    """CPU time of one request to a server, of the thread that sends it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = ServerClient(0, f"http://127.0.0.1:{server.server_port}", 60.0)
    seconds = []
    for _ in range(200):
        begin = time.thread_time()
        client.weight_version()
        seconds.append(time.thread_time() - begin)
    server.shutdown()
    return statistics.median(seconds)


def rank_0(plan: Plan, tokens: float, costs: dict[str, float]) -> dict[str, float]:
    """What rank 0 does in a step, beyond its part of the training. Seconds of one core, which Python's lock shares."""
    config = plan.config
    rollout, ranks = config.rollout, config.train.world_size
    copies = math.ceil(math.log2(ranks))
    return {
        "servers": rollout.servers,
        "requests of a push": rollout.servers * (REQUESTS + PROBE_PROMPTS),
        "requests_s": round(rollout.servers * (REQUESTS + PROBE_PROMPTS) * costs["request_s"], 1),
        "threads of a push": rollout.servers,
        "answers_s": round(tokens * costs["answer_s_per_token"], 1),
        "pickle_s": round(tokens * costs["pickle_s_per_token"], 1),
        "broadcast_s": round(tokens * costs["pickled_bytes_per_token"] * copies / HOST_NETWORK, 1),
        "unpickle_s": round(tokens * costs["unpickle_s_per_token"], 1),
        "rollouts_gb_of_each_rank": round(tokens * costs["held_bytes_per_token"] / 1e9, 2),
    }


def plot(sizes: dict) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpus = [int(size) for size in sizes]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name in sizes[str(gpus[0])]["schedules"]:
        left.plot(gpus, [found["schedules"][name]["step_s"] for found in sizes.values()], marker="o", label=name)
    left.set(title="a step, without rank 0's work", xlabel="GPUs", ylabel="seconds", ylim=(0, None))
    parts = {
        "requests of a push": "requests_s",
        "answers of servers": "answers_s",
        "pickle, send, unpickle": ("pickle_s", "broadcast_s", "unpickle_s"),
    }
    for label, keys in parts.items():
        keys = (keys,) if isinstance(keys, str) else keys
        right.plot(gpus, [sum(found["rank 0"][key] for key in keys) for found in sizes.values()], "o-", label=label)
    right.set(title="rank 0, in a step", xlabel="GPUs", ylabel="seconds of one core", yscale="log")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(gpus, [f"{size:,}" for size in gpus])
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
