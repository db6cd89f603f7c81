"""What digests, the secret and the checks of answers cost, and how the engine's memory grows.

    python benchmarks/reliability.py

`digests_share_of_save`: a rank saves a model with random weights after one update. The share is the median over the
saves of (seconds of digests / seconds of the save). `checks_share_of_step`: the secret and the checks of one step of
the demo, with answers as long as they can be, over the median step of a run of the demo. `late_growth_over_early`: how
much the server's resident memory grows in the last 100 of that run's 300 steps, over the first 100. Results go to
benchmarks/results/reliability.json.
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
from functools import partial
from pathlib import Path

import measure
import psutil
import torch.distributed as dist
from torch import multiprocessing

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.recipe import load_run
from rlad_megatron.data.prompts import build_traces
from rlad_megatron.data.samples import samples_from_traces
from rlad_megatron.observe.metrics import METRICS_FILE
from rlad_megatron.parallel.ports import free_port
from rlad_megatron.rewards import registry
from rlad_megatron.run import LauncherHooks
from rlad_megatron.secret import admits, headers
from rlad_megatron.servers.client import Completion, what_is_wrong

RESULT = Path(__file__).parent / "results" / "reliability.json"
ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "recipes" / "assets" / "kk_tokenizer"
HOST = "127.0.0.1"
OTHER_REQUESTS = 32  # of a step, to push and verify weights
SPAN = 100  # steps
SUPERVISOR = "rlad_megatron.servers.supervisor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768, help="hidden size of the model that is saved")
    parser.add_argument("--repeats", type=int, default=7, help="saves")
    parser.add_argument("--steps", type=int, default=300, help="of the demo's run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        saves = _saves(Path(folder), options.hidden, options.repeats)
        demo = ["eval.every=0", "eval.teacher=false", "checkpoint.every=0", f"train.steps={options.steps}"]
        words = ["kk_tiny_cpu", *demo, f"runs_dir={folder}", f"rollout.port={free_port(HOST, os.getpid())}"]
        config = load_run(words[0], words[1:])
        checks = [_checks(config) for _ in range(options.repeats)]
        steps, memory = _follow(words, config)
    span = min(SPAN, (len(memory) - 1) // 2)
    early, late = memory[span] - memory[0], memory[-1] - memory[-1 - span]
    result = {
        "ratios": {
            "digests_share_of_save": round(measure.median_ratio(saves["digests"], saves["save"]), 4),
            "checks_share_of_step": round(statistics.median(checks) / statistics.median(steps), 5),
            "late_growth_over_early": round(late / early, 3),
        },
        "rounds": saves | {"checks": checks, "step": steps},
        "server_memory": {"mb_by_step": memory, "early_mb": early, "late_mb": late, "steps_of_each": span},
    }
    measure.write_result(RESULT, result)
    print(json.dumps(result["ratios"], indent=2))


def _saves(folder: Path, hidden: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each save, and of the digests in it."""
    student = folder / "student"
    sizes = ["--hidden", str(hidden), "--ffn", str(3 * hidden), "--layers", "8"]
    make = [sys.executable, ROOT / "tools" / "make_model.py", student, "--tokenizer", TOKENIZER, *sizes]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    words = [f"student.path={student}", f"runs_dir={folder}", "name=saves", "data.train_size=64"]
    config = load_run("kk_tiny_teacher_sft", [*words, "train.ranks_per_node=1", "observe.tensorboard=false"])
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.start_processes(_save_repeatedly, args=(config, repeats, queue), nprocs=1, start_method="spawn")
    return queue.get()


def _save_repeatedly(rank: int, config: RunConfig, repeats: int, queue: multiprocessing.SimpleQueue) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": HOST}
    os.environ["MASTER_PORT"] = str(free_port(HOST, os.getpid()))
    platform.setup()
    platform.init_process_group(600)
    from rlad_megatron.setup import open_trainer
    from rlad_megatron.trainer import checkpoint

    seconds: dict[str, list[float]] = {"save": [], "digests": []}
    digests = [0.0]
    for name in ("digests_of", "write_digests"):
        setattr(checkpoint, name, partial(_timed, getattr(checkpoint, name), digests))
    with open_trainer(config, LauncherHooks(find_teacher=_no_teacher)) as run:
        traces = build_traces(config.data, config.sft, run.tokenizer)[: config.sft.batch_size]
        run.accumulate(samples_from_traces(traces, config.objective.aggregation), last=True)
        run.finish_update()  # the optimizer has its moments now
        for step in range(1, repeats + 2):
            run.step = step
            digests[0], begin = 0.0, time.perf_counter()
            run.save_checkpoint()
            if step > 1:  # the first one warms up
                seconds["save"].append(time.perf_counter() - begin)
                seconds["digests"].append(digests[0])
    queue.put(seconds)
    dist.destroy_process_group()


def _timed(function, total: list[float], *arguments):
    begin = time.perf_counter()
    try:
        return function(*arguments)
    finally:
        total[0] += time.perf_counter() - begin


def _no_teacher():
    raise RuntimeError("fine-tuning has no teacher")


def _checks(config: RunConfig) -> float:
    """Seconds of the secret, in client and server, and of the checks of answers and rewards in a step of the demo."""
    longest, token = config.rollout.sampling.max_tokens, "x" * 64
    answer = Completion([5] * longest, [-0.5] * longest, "stop", [("1", longest)])
    reward = registry.RewardResult(3.0, True, {"format": 1.0, "answer": 2.0})
    scope = {"headers": [(b"host", b"x"), (b"authorization", headers(token)["Authorization"].encode())]}
    begin = time.perf_counter()
    for _ in range(config.rollout.prompts_per_step + OTHER_REQUESTS):
        assert headers(token) and admits(scope, token)
    for _ in range(config.rollout.prompts_per_step * config.rollout.group_size):
        assert what_is_wrong(answer, longest, 1000) is None and registry.what_is_wrong(reward) is None
    return time.perf_counter() - begin


def _follow(words: list[str], config: RunConfig) -> tuple[list[float], list[float]]:
    """Run the demo: seconds of each step, and the server's resident MB (1e6 bytes) at the end of each."""
    launcher = psutil.Popen([sys.executable, "-m", "rlad_megatron.cli", "train", *words], stdout=subprocess.DEVNULL)
    metrics, memory = config.run_dir / METRICS_FILE, []
    try:
        while launcher.poll() is None and len(memory) <= config.train.steps:
            steps = metrics.read_text().count("\n") if metrics.exists() else 0
            if steps > len(memory):  # step 0 is the first
                memory += [_server_mb(launcher)] * (steps - len(memory))
            time.sleep(0.1)
        assert launcher.wait() == 0
    finally:
        if launcher.poll() is None:
            launcher.terminate()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["time/step"] for line in lines if line["step"] > 1], memory


def _server_mb(launcher: psutil.Process) -> float:
    (supervisor,) = [p for p in launcher.children(recursive=True) if SUPERVISOR in p.cmdline()]
    return sum(p.memory_info().rss for p in supervisor.children(recursive=True)) / 1e6


if __name__ == "__main__":
    main()
