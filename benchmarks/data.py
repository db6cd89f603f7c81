"""What a million prompts of about 100 tokens add to the start of a run: seconds, and memory of all its processes.

    python benchmarks/data.py

The start's work on data is done as a run does it: the launcher checks the first rows, then two ranks read the prompts,
of which rank 0 holds them, and draw the first round. Once with many prompts and once with few; the results are the
differences. Prompts are random words with the frequencies of a language, tokenised by a BPE tokenizer with a chat
template that is trained on them. `seconds_over_bound` and `memory_over_bound` are over 120 s and 1.5e9 bytes. Memory is
the highest resident size of each process, summed; pages that processes share count in each. Results go to
benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from statistics import median

from measure import write_result

from rlad_megatron.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)

RESULT = Path(__file__).parent / "results" / "data.json"
STUDENT = Path(__file__).parents[1] / "recipes" / "assets" / "kk_tiny_student"
RANKS, FEW = 2, 1000
DISTINCT = 50_000  # texts; a number before each makes the prompts distinct
BOUND_S, BOUND_BYTES = 120, 1.5e9
WORDS_PER_PROMPT = 76  # about 100 tokens
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def questions(count: int) -> Iterator[str]:
    rng = random.Random(0)
    syllables = ["".join(pair) for pair in zip("bcdfghklmnprstvz" * 5, "aeiou" * 16, strict=True)]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(50_000)]
    frequencies = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))  # Zipf's law
    for _ in range(count):
        yield " ".join(rng.choices(words, cum_weights=frequencies, k=WORDS_PER_PROMPT))


def write_tokenizer(folder: Path) -> None:
    """A Hugging Face folder with a BPE tokenizer and the demo student's config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=["<|start|>", "<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(questions(20_000), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    (folder / "config.json").write_bytes((STUDENT / "config.json").read_bytes())


def run_config(folder: Path, count: int) -> RunConfig:
    source = folder / f"{count}.jsonl"
    if not source.exists():
        with source.open("w") as file:
            texts = list(questions(min(count, DISTINCT)))
            for number in range(count):
                text = f"{number} {texts[number % len(texts)]}"
                file.write(json.dumps({"prompt": text, "answer": str(number)}) + "\n")
    sampling = SamplingConfig(max_tokens=256)
    return RunConfig(
        student=ModelConfig(path=str(folder)),
        objective=ObjectiveConfig(name="grpo"),
        data=DataConfig(source=str(source), reward="math"),
        rollout=RolloutConfig(sampling=sampling),
        eval=EvalConfig(sampling=sampling),
    )


def check(config: RunConfig, results: multiprocessing.SimpleQueue) -> None:
    """The launcher's part."""
    from rlad_megatron.data.tokenizers import load_tokenizer
    from rlad_megatron.launch.preflight import check_prompts
    from rlad_megatron.models.config_json import read_specs

    start = time.perf_counter()
    check_prompts(config, read_specs(config), load_tokenizer(config.student.path))
    results.put({"process": "launcher", "seconds": time.perf_counter() - start, "bytes": peak_bytes()})


def read(rank: int, port: int, config: RunConfig, results: multiprocessing.SimpleQueue) -> None:
    """A rank's part."""
    import torch.distributed as dist

    from rlad_megatron.run_prompts import read_prompts
    from rlad_megatron.setup import open_window

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    dist.barrier()
    start = time.perf_counter()
    prompts = read_prompts(config)
    tokens = 0.0
    if window := open_window(config, prompts):
        assert len(window.round(1)) == config.rollout.prompts_per_step
        assert prompts.held is not None
        tokens = float(prompts.held.train.lengths.mean())
    dist.barrier()
    seconds = time.perf_counter() - start
    results.put({"process": f"rank {rank}", "seconds": seconds, "bytes": peak_bytes(), "mean_tokens": tokens})
    dist.destroy_process_group()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start_of_run(config: RunConfig) -> list[dict]:
    """What each process took."""
    from rlad_megatron.parallel.ports import free_port

    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    found = []
    port = free_port("127.0.0.1", os.getpid())
    for arguments in ([(check, (config, results))], [(read, (rank, port, config, results)) for rank in range(RANKS)]):
        processes = [context.Process(target=target, args=values) for target, values in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        found += [results.get() for _ in processes]
    return sorted(found, key=lambda part: part["process"])


def seconds_of(parts: list[dict]) -> float:
    """The launcher's, and after it the slowest rank's."""
    launcher, *ranks = parts
    return launcher["seconds"] + max(part["seconds"] for part in ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        configs = {"few": run_config(Path(folder), FEW), "many": run_config(Path(folder), args.prompts)}
        for _ in range(args.repeats):
            rounds.append({name: start_of_run(config) for name, config in configs.items()})
            print(json.dumps(rounds[-1], indent=2), flush=True)
    # A launcher ends its check before ranks start, but it stays; its memory counts too.
    seconds = median(seconds_of(part["many"]) - seconds_of(part["few"]) for part in rounds)
    memory = median(
        sum(part["bytes"] for part in found["many"]) - sum(part["bytes"] for part in found["few"]) for found in rounds
    )
    result = {
        "ratios": {
            "seconds_over_bound": round(seconds / BOUND_S, 3),
            "memory_over_bound": round(memory / BOUND_BYTES, 3),
        },
        "added": {"prompts": args.prompts, "seconds": round(seconds, 1), "bytes": memory},
        "rounds": rounds,
    }
    write_result(RESULT, result)
    print(json.dumps(result["ratios"], indent=2))


if __name__ == "__main__":
    main()
