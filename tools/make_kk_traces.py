"""Write traces for the demo's student: some puzzles are worked out, the others are answered by a guess.

    python tools/make_kk_traces.py runs/kk_tiny_traces.jsonl --guesses 0.65

A student fine-tuned on them can reason but often does not bother, which is what RL is to change. Each line holds
"prompt" and "response", as `sft.traces` takes them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from recipes.kk_tiny_teacher_sft import kk_tiny_teacher_sft
from rlad_megatron.data.knights_and_knaves import generate_puzzles, gold_trace, question_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSONL to write")
    parser.add_argument("--guesses", type=float, default=0.65, help="share of the traces that guess (0.65)")
    parser.add_argument("--seed", type=int, default=0, help="of the guesses (0)")
    options = parser.parse_args()

    draw = random.Random(options.seed)
    lines = []
    for puzzle in generate_puzzles(kk_tiny_teacher_sft().data, "train"):
        response = gold_trace(puzzle)
        if draw.random() < options.guesses:
            roles = [draw.choice(("knight", "knave")) for _ in puzzle.names]
            people = " ".join(
                f"({number}) {name} is a {role}"
                for number, (name, role) in enumerate(zip(puzzle.names, roles, strict=True), start=1)
            )
            response = f"<think> </think> <answer> {people} </answer>"
        lines.append(json.dumps({"prompt": question_text(puzzle, "plain"), "response": response}))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text("\n".join(lines) + "\n")
    print(f"{options.file}: {len(lines)} traces")


if __name__ == "__main__":
    main()
