"""What writing sample rollouts costs a step, and what reading them costs `rlad watch` and the report.

    python benchmarks/watch.py

Two run folders, each with 8 rollouts a step: "short" has 10,000 rollouts of 60 tokens, "long" 160 of 16,384 tokens with
ten figures a token. Of each, the seconds to write a step, to read all rollouts for the list (`RolloutIndex.poll`), and
to search them for a text (each round for another one); files are in the page cache. `index_over_parse` and
`search_over_parse` are those seconds over what parsing every line takes, medians of paired rounds. Texts of tokens are
given, so `write` has no tokenizer in it. Results go to benchmarks/results/watch.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch
from measure import median_ratio, paired_seconds, write_result

from rlad_megatron.observe.rollout_index import Filter, RolloutIndex
from rlad_megatron.observe.rollouts import write_rollouts
from rlad_megatron.types import Prompt, Rollout, Sample

RESULT = Path(__file__).parent / "results" / "watch.json"
FOLDERS = {"short": (1250, 60), "long": (20, 16_384)}  # steps, tokens of a response
STATS = ("log_probs", "ratio", "clipped", "teacher_gap", "clamped", "entropy")


def a_step(run_dir: Path, step: int, tokens: int) -> float:
    """Write a step of 8 rollouts; the seconds of it."""
    prompt = Prompt(f"p{step}", tuple(range(70)), answer="A", subset="PPL2", text="Who is a knave? " * 10)
    groups, samples = [], []
    for _ in range(8):
        log_probs = -torch.rand(tokens)
        text = " ".join(f"word{step}" for _ in range(tokens))
        rollout = Rollout(prompt, list(range(tokens)), log_probs.tolist(), "stop", [(step, tokens)], text, reward=1.0)
        sample = Sample(torch.zeros(70 + tokens), 70, torch.ones(tokens), 1.0, log_probs)
        sample.teacher_log_probs = -torch.rand(tokens)
        sample.token_stats = {name: torch.randn(tokens) for name in STATS}
        groups.append([rollout])
        samples.append(sample)
    start = time.perf_counter()
    write_rollouts(run_dir, step, groups, samples, lambda ids: ["word "] * len(ids))
    return time.perf_counter() - start


def measured(run_dir: Path, steps: int, tokens: int, repeats: int) -> dict[str, list[float]]:
    run_dir.mkdir()
    writing = [a_step(run_dir, step, tokens) for step in range(1, steps + 1)]
    files = sorted((run_dir / "rollouts").iterdir())
    texts = (f"WORD{number} no such" for number in itertools.count())
    index = RolloutIndex(run_dir)
    index.poll()
    assert index.count == 8 * steps

    def parse() -> None:
        for file in files:
            for line in file.read_bytes().splitlines():
                json.loads(line)

    actions = {
        "parse": parse,
        "index": lambda: RolloutIndex(run_dir).poll(),
        "search": lambda: index.page(Filter(text=next(texts)), 0, 50),
    }
    seconds = {"write": writing[-min(steps, 10) :], **paired_seconds(actions, repeats)}
    seconds["megabytes"] = [sum(file.stat().st_size for file in files) / 1e6]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rounds = {name: measured(Path(folder) / name, *size, args.repeats) for name, size in FOLDERS.items()}
    result = {
        "ratios": {
            f"{name}/{action}_over_parse": round(median_ratio(seconds[action], seconds["parse"]), 3)
            for name, seconds in rounds.items()
            for action in ("index", "search")
        },
        "rounds": rounds,
    }
    write_result(RESULT, result)
    print(json.dumps(result["ratios"], indent=2))


if __name__ == "__main__":
    main()
