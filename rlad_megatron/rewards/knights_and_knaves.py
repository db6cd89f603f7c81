"""Logic-RL's rule reward for Knights & Knaves (arXiv 2502.14768, section 2.2): format plus answer, from -3 to 3."""

from __future__ import annotations

import re

from rlad_megatron.data.knights_and_knaves import opens_thinking
from rlad_megatron.data.tokenizers import TAGS
from rlad_megatron.errors import DataError
from rlad_megatron.rewards.registry import RewardResult
from rlad_megatron.types import Prompt

FORMAT_RIGHT, FORMAT_WRONG = 1.0, -1.0
ANSWER_RIGHT, ANSWER_WRONG, ANSWER_UNREADABLE = 2.0, -1.5, -2.0


def reward(prompt: Prompt, text: str) -> RewardResult:
    """Score one response.

    format: +1 if each of the four tags occurs exactly once and in order, else -1.
    answer: +2 if every person has the gold role, -1.5 if some roles are wrong, -2 if the answer is unreadable or the
    format is wrong. Solved means that both are right.
    Raises DataError if the prompt's gold answer is unreadable, and never because of `text`.
    """
    gold = _roles(prompt.answer)
    if not gold:
        raise DataError(
            f"prompt {prompt.id}: answer {prompt.answer!r} names no one; write e.g. '(1) Zoey is a knight (2) ...'"
        )
    if opens_thinking(prompt.text):  # the chat template wrote the first tag, so the response does not
        text = TAGS[0] + text
    places = [text.find(tag) for tag in TAGS]
    if any(text.count(tag) != 1 for tag in TAGS) or places != sorted(places):
        return _result(FORMAT_WRONG, ANSWER_UNREADABLE)
    roles = _roles(text[places[2] + len(TAGS[2]) : places[3]])
    if roles is None or roles.keys() != gold.keys():
        return _result(FORMAT_RIGHT, ANSWER_UNREADABLE)
    return _result(FORMAT_RIGHT, ANSWER_RIGHT if roles == gold else ANSWER_WRONG)


def _result(format_score: float, answer_score: float) -> RewardResult:
    parts = {"format": format_score, "answer": answer_score}
    return RewardResult(format_score + answer_score, solved=answer_score == ANSWER_RIGHT, parts=parts)


def _roles(answer: str) -> dict[str, str] | None:
    """Role of each person, in lower case; None if a person is named twice.

    Only words count; punctuation and numbering do not. A role follows "is a" or part of it, which follows the name.
    Every role word needs its own name, so an answer that hedges ("a knight or a knave") or denies ("not a knight")
    yields a name that no one has. One pass, because a regular expression for this backtracks for minutes.
    """
    words = ["", "", "", *re.findall(r"[^\W\d_]+", answer.lower())]  # a role at the beginning has the name ""
    roles: dict[str, str] = {}
    for place, word in enumerate(words):
        if word in ("knight", "knave"):
            before = place - 1 - (words[place - 1] in ("a", "an"))
            name = words[before - (words[before] == "is")]
            if name in roles:
                return None
            roles[name] = word
    return roles
