"""Knights & Knaves puzzles from reasoning-gym's generator: on an island, knights tell the truth and knaves lie.

Two renderings. "chat" is the puzzle in English with an instruction like Logic-RL's (arXiv 2502.14768).
"plain" uses a closed vocabulary of words, one token each, for models of a million parameters.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlad_megatron.config import DataConfig
from rlad_megatron.errors import ConfigError, DataError

MAX_PEOPLE = 8
MAX_REPEATS = 2000  # draws in a row without a new puzzle; then the space of puzzles counts as exhausted
ROLES, TRUTH = ("knave", "knight"), ("F", "T")  # by truth value
BASIC = ("telling-truth", "lying")  # statements about one person's role
# Whether a compound statement is true, given whether its parts are.
COMPOUND: dict[str, Callable[[list[bool]], bool]] = {"not": lambda parts: not parts[0], "and": all, "or": any}
COMPOUND |= {"->": lambda parts: parts[0] <= parts[1], "<=>": lambda parts: parts[0] == parts[1]}

SYSTEM_PROMPT = (
    "You are a careful assistant. First reason about the question step by step, then answer it. "
    "Write the reasoning between <think> and </think> and the answer between <answer> and </answer>: "
    "<think> reasoning here </think><answer> answer here </answer>. "
    "The question is a logic puzzle about people who are each a knight or a knave. When you are sure, "
    "list every person's identity inside the answer tags, one per line, in the order in which the people are named, "
    "for example:\n<answer>\n(1) Zoey is a knight\n(2) Oliver is a knave\n</answer>"
)


@dataclass(frozen=True)
class Puzzle:
    """One puzzle with exactly one solution.

    Statements are reasoning-gym's nested tuples: ("telling-truth", i), ("lying", i), ("not", s), ("and", s, ...),
    ("or", s, ...), ("->", s, s), ("<=>", s, s), where i is the index of a person and s a statement.
    Example: Puzzle("kk/2/17", ("Zoey", "Oliver"), (("lying", 1), ("telling-truth", 0)), (False, True), "A very ...")
    """

    id: str  # "kk/<people>/<number>"
    names: tuple[str, ...]
    statements: tuple[Any, ...]  # statements[i] is what names[i] says
    solution: tuple[bool, ...]  # True: knight
    question: str  # in English, with the words knight and knave

    @property
    def subset(self) -> str:
        return f"PPL{len(self.names)}"


def generate_puzzles(config: DataConfig, split: str) -> list[Puzzle]:
    """The puzzles of one split ("train" or "test"). Deterministic in `config`.

    Each number of people has one seeded stream. Its first distinct puzzles are held out and the next ones are for
    training, so the held-out part does not change with `train_size`. Puzzles with the same sentences in a different
    order count as equal. Costs about 0.6 ms per puzzle of 2 people, 3 ms of 5, 25 ms of 8.
    Raises ConfigError for an impossible shape, DataError when fewer distinct puzzles exist than requested.
    """
    _check(config)
    puzzles = []
    share, remainder = divmod(config.eval_size, len(config.people))
    for index, people in enumerate(config.people):
        held_out = share + (index < remainder)
        start, stop = (0, held_out) if split == "test" else (held_out, held_out + config.train_size)
        puzzles += _distinct_puzzles(config, people, stop)[start:]
    return puzzles


def _check(config: DataConfig) -> None:
    """Refuse shapes on which reasoning-gym's sampler fails or never returns."""
    if len(set(config.people)) != len(config.people):
        raise ConfigError(f"data.people={list(config.people)} repeats a number; give each number once")
    # With basic statements only, no puzzle has a unique solution: swapping every role leaves every check unchanged.
    if config.depth < 2:
        raise ConfigError(f"data.depth={config.depth} must be at least 2")
    # "and" and "or" take distinct operands, and one person can make only 2 * people - 1 distinct basic statements.
    fewest = min(config.people)
    if not 2 <= config.width < 2 * fewest:
        raise ConfigError(f"data.width={config.width} must be from 2 to {2 * fewest - 1} with {fewest} people")


def _distinct_puzzles(config: DataConfig, people: int, wanted: int) -> list[Puzzle]:
    with warnings.catch_warnings():
        # Python warns about the sources of reasoning-gym's dependencies when it compiles them for the first time.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym

    # reasoning-gym seeds item i with seed + i; the factor keeps streams of neighbouring seeds disjoint.
    stream = reasoning_gym.create_dataset(
        "knights_knaves",
        n_people=people,
        depth_constraint=config.depth,
        width_constraint=config.width,
        seed=config.seed * 1_000_000_007,
        size=2**31 - 1,
    )
    found: dict[frozenset[str], Puzzle] = {}
    repeats = index = 0
    while len(found) < wanted:
        puzzle = _to_puzzle(stream[index], f"kk/{people}/{len(found)}")
        key = frozenset(_sentences(puzzle))
        index += 1
        repeats = repeats + 1 if key in found else 0
        if repeats > MAX_REPEATS:
            raise DataError(
                f"data.train_size={config.train_size} and data.eval_size={config.eval_size}: only about {len(found)} "
                f"distinct puzzles of {people} people exist at data.depth={config.depth}; lower them or raise depth"
            )
        found.setdefault(key, puzzle)
    return list(found.values())


def _to_puzzle(item: dict[str, Any], puzzle_id: str) -> Puzzle:
    metadata = item["metadata"]
    question = item["question"].split(" (Format your answer like")[0]  # the system prompt states the format
    # reasoning-gym draws other words for the two roles (pioneer and laggard, ...) and has no option against it.
    # Terms with an article come first: "an angel" becomes "a knight".
    for term in ("a_knight", "a_knave", "knight", "knave", "Knight", "Knave"):
        question = question.replace(str(metadata["knight_knave_terms"][term]), term.replace("_", " "))
    return Puzzle(
        id=puzzle_id,
        names=tuple(str(name) for name in metadata["names"]),
        statements=metadata["statements"],
        solution=metadata["solution"],
        question=question,
    )


def question_text(puzzle: Puzzle, style: str) -> str | list[dict[str, str]]:
    """What `Tokenizer.render` takes: chat messages in style "chat", one string of words in style "plain"."""
    if style == "chat":
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": puzzle.question}]
    return " ".join(_sentences(puzzle))


def answer_text(puzzle: Puzzle) -> str:
    """The gold answer, e.g. "(1) Zoey is a knight (2) Oliver is a knave"."""
    roles = zip(puzzle.names, puzzle.solution, strict=True)
    return " ".join(f"({i}) {name} is a {ROLES[knight]}" for i, (name, knight) in enumerate(roles, start=1))


def gold_trace(puzzle: Puzzle) -> str:
    """A response that solves the puzzle by trial: suppose roles, check each statement, stop at a contradiction.

    Suppositions come in a fixed order, all knights first and the last person's role changing fastest, so a small model
    can learn which comes next. `Zoey says F` means that Zoey's statement is false under the supposition.
    Example: "<think> suppose Zoey T Oliver T : Zoey says F no . suppose Zoey T Oliver F : Zoey says T Oliver says F
    yes . </think> <answer> (1) Zoey is a knight (2) Oliver is a knave </answer>"
    """
    words = ["<think>"]
    for roles in itertools.product((True, False), repeat=len(puzzle.names)):
        supposed = (f"{name} {TRUTH[knight]}" for name, knight in zip(puzzle.names, roles, strict=True))
        words += ["suppose", *supposed, ":"]
        for name, knight, statement in zip(puzzle.names, roles, puzzle.statements, strict=True):
            said = holds(statement, roles)
            words.append(f"{name} says {TRUTH[said]}")
            if said != knight:
                words.append("no .")
                break
        else:
            words.append("yes .")
            break
    words += ["</think>", "<answer>", answer_text(puzzle), "</answer>"]
    return " ".join(words)


def opens_thinking(prompt_text: str) -> bool:
    """Whether the chat template already wrote <think>, as templates of reasoning-only models do."""
    return prompt_text.rstrip().endswith("<think>")


def holds(statement: tuple[Any, ...], roles: tuple[bool, ...]) -> bool:
    """Whether a statement is true when person i is a knight exactly where roles[i] is True."""
    kind, *parts = statement
    if kind in BASIC:
        return roles[parts[0]] == (kind == "telling-truth")
    if kind not in COMPOUND:
        raise DataError(f"knights_and_knaves: unknown statement kind {kind!r}; pin reasoning-gym to 0.1.25")
    return COMPOUND[kind]([holds(part, roles) for part in parts])


def vocabulary() -> list[str]:
    """Every word of the plain style: prompts, traces and answers of up to 8 people."""
    from reasoning_gym.logic.knights_knaves import COMMON_NAMES

    tags = ["<think>", "</think>", "<answer>", "</answer>", *(f"({i})" for i in range(1, MAX_PEOPLE + 1))]
    sentences = ["says", "is", "a", "knight", "knave", "not", "and", "or", "if", "then", "iff", "(", ")", "."]
    trial = ["suppose", ":", "T", "F", "yes", "no"]
    return tags + sentences + trial + list(COMMON_NAMES)


def _sentences(puzzle: Puzzle) -> list[str]:
    """One sentence per person, e.g. "Zoey says if Oliver is a knave then Zoey is a knight ."."""
    said = zip(puzzle.names, puzzle.statements, strict=True)
    return [f"{name} says {_words(statement, puzzle.names)} ." for name, statement in said]


def _words(statement: tuple[Any, ...], names: tuple[str, ...]) -> str:
    kind, *parts = statement
    if kind in BASIC:
        return f"{names[parts[0]]} is a {ROLES[kind == 'telling-truth']}"
    if kind == "not" and parts[0][0] in BASIC:  # as the English text does
        return f"{names[parts[0][1]]} is a {ROLES[parts[0][0] == 'lying']}"
    inner = [_words(part, names) if part[0] in BASIC else f"( {_words(part, names)} )" for part in parts]
    if kind == "not":
        return f"not {inner[0]}"
    if kind == "->":
        return f"if {inner[0]} then {inner[1]}"
    return f" {'iff' if kind == '<=>' else kind} ".join(inner)
