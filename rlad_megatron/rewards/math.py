"""Reward for mathematics, verified by the math-verify library: 1 if the answer equals the gold answer, else 0."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from rlad_megatron.errors import DataError
from rlad_megatron.rewards.registry import RewardResult
from rlad_megatron.types import Prompt

TIMEOUT_S = 3  # for parsing and for comparing, each; sympy may never return on what a model invents
TAIL_CHARACTERS = 4000  # the answer is at the end; parsing more costs time and finds old guesses
BOX, FRAMED_BOX = "\\boxed{", "\\fbox{"
STATED = re.compile(r"the (?:final )?answer is", re.IGNORECASE)


def reward(prompt: Prompt, text: str) -> RewardResult:
    """Score one response.

    The answer is the last \\boxed{...} or \\fbox{...} after the reasoning (</think>). Unfinished reasoning and an
    unclosed box have no answer. A comparison that exceeds TIMEOUT_S counts as wrong.
    Raises DataError if the prompt's gold answer is unreadable, and never because of `text`. Must run in the main
    thread: math-verify's timeout uses SIGALRM, and it raises ValueError elsewhere.
    """
    return _compare(prompt, _final_answer(text, lenient=False))


def lenient_reward(prompt: Prompt, text: str) -> RewardResult:
    """As `reward`. Without a box, the answer is what math-verify finds after the last "The answer is"."""
    return _compare(prompt, _final_answer(text, lenient=True))


def _compare(prompt: Prompt, answer: str) -> RewardResult:
    gold = _parse_gold(prompt.answer)
    if not gold:
        raise DataError(f"prompt {prompt.id}: math answer {prompt.answer!r} is unreadable; write a number or LaTeX")
    guess = _parse(answer) if answer else []
    solved = bool(guess) and bool(verify(list(gold), guess, timeout_seconds=TIMEOUT_S))
    return RewardResult(score=float(solved), solved=solved, parts={"answer": float(solved)})


def _final_answer(text: str, *, lenient: bool) -> str:
    """The part of a response to parse, "" if there is none."""
    _reasoning, closed, answer = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return ""
    answer = answer[-TAIL_CHARACTERS:].replace(FRAMED_BOX, BOX)  # math-verify knows only one of the two
    start = answer.rfind(BOX)
    if start < 0:
        stated = list(STATED.finditer(answer)) if lenient else []
        return answer[stated[-1].start() :] if stated else ""
    depth = 0
    for end in range(start + len(BOX) - 1, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[end], 0)
        if depth == 0:
            return answer[start : end + 1]
    return ""  # cut off inside the box


@lru_cache(maxsize=4096)
def _parse_gold(answer: str) -> tuple[Any, ...]:
    """math-verify recognises bare LaTeX only inside a box. GSM8K's answers are solutions that end in "#### 72"."""
    answer = answer.rpartition("####")[2]
    bare = "\\boxed" not in answer and "$" not in answer
    return tuple(_parse(f"{BOX}{answer}}}" if bare and answer.strip() else answer))


def _parse(text: str) -> list[Any]:
    return parse(text, parsing_timeout=TIMEOUT_S)
