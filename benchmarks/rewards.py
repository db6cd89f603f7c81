"""The math reward in a pool of processes against the same reward called in this process.

    python benchmarks/rewards.py

Ordinary answers: all are scored in this process and by two workers, in a different order in every round, and the
results have to be the same. Every round has new answers, because processes cache what they parsed.
`two_workers_over_one` is the speed with two workers over that in this process, the median over the rounds. Hostile
answers: one batch, a quarter of which takes math-verify its time limit. `hostile_seconds_over_bound` is the time with
two workers over (limit * hostile answers / workers). Workers have imported the reward before the clock starts. Results
go to benchmarks/results/rewards.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path

from measure import median_ratio, paired_seconds, write_result

from rlad_megatron.config import DataConfig
from rlad_megatron.rewards.math import TIMEOUT_S
from rlad_megatron.rewards.pool import RewardPool
from rlad_megatron.rewards.registry import RewardResult, load_reward
from rlad_megatron.types import Prompt

RESULT = Path(__file__).parent / "results" / "rewards.json"
WORKERS = 2
HOSTILE = ["9^{9^{9^{9}}}", "10000000!", "*".join(rf"\sqrt{{{number}}}" for number in range(2, 302))]
Response = tuple[Prompt, str]


def ordinary(count: int, rng: random.Random) -> list[Response]:
    """Fractions, roots, sums and tuples, half of them right."""
    responses = []
    for index in range(count):
        a, b = rng.randrange(2, 500), rng.randrange(2, 500)
        gold, same = [
            (f"{a + b}", f"{a}+{b}"),
            (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{2 * a}}}{{{2 * b}}}"),
            (rf"{a}\sqrt{{2}}", rf"\sqrt{{{2 * a * a}}}"),
            (f"({a}, {b})", f"({a}, {b})"),
        ][index % 4]
        answer = same if rng.random() < 0.5 else f"{a - b}"
        prompt = Prompt(id=f"ordinary/{index}", tokens=(), answer=gold, subset="all", text="")
        responses.append((prompt, rf"<think> so </think> The answer is \boxed{{{answer}}}."))
    return responses


def with_hostile(responses: list[Response], count: int, rng: random.Random) -> list[Response]:
    """The responses, of which `count` at random places have hostile answers."""
    responses = list(responses)
    for turn, place in enumerate(rng.sample(range(len(responses)), count)):
        responses[place] = (responses[place][0], rf"\boxed{{{HOSTILE[turn % len(HOSTILE)]}}}")
    return responses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=10_000, help="ordinary answers of a round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256, help="answers with hostile ones; a quarter is hostile")
    args = parser.parse_args()
    rng = random.Random(0)
    hard = with_hostile(ordinary(args.batch, rng), args.batch // 4, rng)
    reward = load_reward("math")
    rounds = {name: itertools.count() for name in ("one", "two")}
    results: dict[str, list[RewardResult]] = {}

    with (
        tempfile.TemporaryDirectory() as folder,
        RewardPool(DataConfig(reward="math", reward_workers=WORKERS), Path(folder)) as pool,
    ):

        def answers(name: str) -> list[Response]:
            return ordinary(args.answers, random.Random(next(rounds[name])))

        def one() -> None:
            results["one"] = [reward(prompt, text) for prompt, text in answers("one")]

        def two() -> None:
            results["two"] = pool.score(answers("two"))

        seconds = paired_seconds({"one": one, "two": two}, args.repeats)
        assert results["one"] == results["two"]
        start = time.perf_counter()
        pool.score(hard)
        hostile_seconds = time.perf_counter() - start

    bound = TIMEOUT_S * (args.batch // 4) / WORKERS
    result = {
        "ratios": {
            "two_workers_over_one": round(median_ratio(seconds["one"], seconds["two"]), 3),
            "hostile_seconds_over_bound": round(hostile_seconds / bound, 3),
        },
        "rounds": seconds,
        "hostile": {"answers": args.batch, "hostile": args.batch // 4, "seconds": hostile_seconds, "bound": bound},
    }
    write_result(RESULT, result)
    print(json.dumps(result["ratios"], indent=2))


if __name__ == "__main__":
    main()
