"""Write traces for the demo's student: some solve their puzzle step by step, the others guess.

    python tools/make_kk_traces.py runs/kk_tiny_traces.jsonl --guesses 0.65

A student fine-tuned on them can reason but often guesses instead; RL should change that. Each line holds "prompt" and
"response", the format of `sft.traces`.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from recipes.kk_tiny_teacher_sft import kk_tiny_teacher_sft
from rlad_megatron.data.knights_and_knaves import answer_text, generate_puzzles, gold_trace, question_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSONL to write")
    parser.add_argument("--guesses", type=float, default=0.65, help="share of traces that guess (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the guesses (%(default)s)")
    options = parser.parse_args()

    draw = random.Random(options.seed)
    lines = []
    for puzzle in generate_puzzles(kk_tiny_teacher_sft().data, "train"):
        response = gold_trace(puzzle)
        if draw.random() < options.guesses:
            guess = replace(puzzle, solution=tuple(draw.choice((True, False)) for _ in puzzle.names))
            response = f"<think> </think> <answer> {answer_text(guess)} </answer>"
        lines.append(json.dumps({"prompt": question_text(puzzle, "plain"), "response": response}))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text("\n".join(lines) + "\n")
    print(f"{options.file}: {len(lines)} traces")


if __name__ == "__main__":
    main()
