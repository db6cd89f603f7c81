"""Write traces for the models of the demo and of the studies, which solve puzzles step by step or fail in a known way.

    python tools/make_kk_traces.py runs/kk_tiny_traces.jsonl --guesses 0.65

A student fine-tuned on guesses can reason but often guesses instead; RL should change that. Each line holds "prompt"
and "response", the format of `sft.traces`.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from recipes.kk_tiny_teacher_sft import kk_tiny_teacher_sft
from rlad_megatron.data.knights_and_knaves import (
    BASIC,
    Puzzle,
    answer_text,
    generate_puzzles,
    gold_trace,
    holds,
    question_text,
)

SURRENDER = "<think> </think> <answer> </answer>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSONL to write")
    parser.add_argument("--guesses", type=float, default=0.65, help="share of traces that guess (%(default)s)")
    parser.add_argument("--surrenders", type=float, default=0.0, help="share of traces without an answer (%(default)s)")
    parser.add_argument(
        "--xor", action="store_true", help='read "iff" as "either ... or", and so solve the wrong puzzle'
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the guesses (%(default)s)")
    options = parser.parse_args()

    draw = random.Random(options.seed)
    lines = []
    for puzzle in generate_puzzles(kk_tiny_teacher_sft().data, "train"):
        surrenders = options.surrenders and draw.random() < options.surrenders
        response = SURRENDER if surrenders else _response(puzzle, draw, options.guesses, xor=options.xor)
        lines.append(json.dumps({"prompt": question_text(puzzle, "plain"), "response": response}))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text("\n".join(lines) + "\n")
    print(f"{options.file}: {len(lines)} traces")


def _response(puzzle: Puzzle, draw: random.Random, guesses: float, *, xor: bool) -> str:
    if draw.random() < guesses:
        guess = replace(puzzle, solution=tuple(draw.choice((True, False)) for _ in puzzle.names))
        return f"<think> </think> <answer> {answer_text(guess)} </answer>"
    if not xor:
        return gold_trace(puzzle)
    puzzle = replace(puzzle, statements=tuple(map(_with_xor, puzzle.statements)))
    return gold_trace(replace(puzzle, solution=_first_consistent(puzzle)))


def _with_xor(statement: tuple[Any, ...]) -> tuple[Any, ...]:
    """With "either or" in place of "iff"."""
    kind, *parts = statement
    if kind in BASIC:
        return statement
    changed = (kind, *map(_with_xor, parts))
    return ("not", changed) if kind == "<=>" else changed


def _first_consistent(puzzle: Puzzle) -> tuple[bool, ...]:
    """The first roles that contradict no statement; the last ones if all do."""
    for roles in product((True, False), repeat=len(puzzle.names)):
        if all(holds(said, roles) == knight for said, knight in zip(puzzle.statements, roles, strict=True)):
            break
    return roles


if __name__ == "__main__":
    main()
