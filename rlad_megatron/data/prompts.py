"""Prompts for training and evaluation, traces for fine-tuning, and the order in which prompts are used."""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from rlad_megatron.config import DataConfig, SftConfig
from rlad_megatron.data import knights_and_knaves
from rlad_megatron.data.tokenizers import Tokenizer
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.types import Prompt

KNIGHTS_AND_KNAVES = "knights_and_knaves"
PROMPT_FIELDS = ("id", "prompt", "answer", "response", "subset")  # other fields of a line are metadata for the reward
DROPPED_SHARE = 10  # at most one in this many prompts may be too long
HELD_OUT_SHARE = 10  # at most one in this many lines of a JSONL source is held out


def build_prompts(config: DataConfig, tokenizer: Tokenizer, split: str) -> list[Prompt]:
    """All prompts of one split, "train" or "test", rendered and tokenised. Deterministic in `config`.

    Test prompts come from `eval_source` if it is set, else from the held-out part of the source. That part is puzzles
    that differ from every training puzzle, or the last lines of a JSONL file (`eval_size`, at most a tenth of them);
    training then skips their prompts wherever else they occur.
    Raises DataError for a missing or malformed file, ConfigError for fields that do not fit.
    """
    if split == "test" and config.eval_source:
        lines = _read_jsonl(Path(config.eval_source), "answer")
    elif config.source == KNIGHTS_AND_KNAVES:
        puzzles = knights_and_knaves.generate_puzzles(config, split)
        return [_puzzle_prompt(puzzle, config, tokenizer) for puzzle in puzzles]
    else:
        lines = _split_lines(_read_jsonl(Path(config.source), "answer"), config, split)
    return [line.to_prompt(config, tokenizer) for line in lines]


def build_traces(config: DataConfig, sft: SftConfig, tokenizer: Tokenizer) -> list[tuple[Prompt, list[int]]]:
    """Prompts and the response tokens to learn, including end of sequence.

    They come from the JSONL file `sft.traces` ("prompt" and "response" on each line) if it is set, else they are gold
    traces of the training puzzles. Raises as `build_prompts` does.
    """
    if sft.traces:
        lines = _read_jsonl(Path(sft.traces), "response")
        pairs = [(line.to_prompt(config, tokenizer), line.known_text("response", tokenizer)) for line in lines]
    elif config.source == KNIGHTS_AND_KNAVES:
        puzzles = knights_and_knaves.generate_puzzles(config, "train")
        prompts = [_puzzle_prompt(puzzle, config, tokenizer) for puzzle in puzzles]
        pairs = [(prompt, _gold_response(prompt, puzzle)) for prompt, puzzle in zip(prompts, puzzles, strict=True)]
    else:
        raise ConfigError(
            f"sft.traces is empty and data.source={config.source} has no gold traces; set sft.traces to a JSONL file "
            'with "prompt" and "response"'
        )
    return [(prompt, [*tokenizer.encode(response), tokenizer.eos_ids[0]]) for prompt, response in pairs]


def fitting_traces(
    traces: Sequence[tuple[Prompt, list[int]]], most_prompt_tokens: int, positions: int
) -> list[tuple[Prompt, list[int]]]:
    """The traces whose prompt has at most `most_prompt_tokens` tokens (0: any) and that fit into the positions.

    Raises ConfigError if more than a tenth do not.
    """
    kept = [
        (prompt, response)
        for prompt, response in traces
        if len(prompt.tokens) <= (most_prompt_tokens or positions) and len(prompt.tokens) + len(response) <= positions
    ]
    if (len(traces) - len(kept)) * DROPPED_SHARE > len(traces):
        bound, remedy = "", ""
        if most_prompt_tokens:
            bound, remedy = f" or data.max_prompt_tokens={most_prompt_tokens}", ", or raise data.max_prompt_tokens"
        raise ConfigError(
            f"{len(traces) - len(kept)} of {len(traces)} traces, more than a tenth, exceed the {positions} positions "
            f"of the student{bound}; shorten them{remedy}"
        )
    return kept


class PromptSource:
    """An endless stream of prompts. Each epoch has every prompt once, in an order seeded by (seed, epoch).

    A batch may span two epochs. Restoring a `state_dict` continues with the same batches.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        self.prompts = prompts
        self._identity = {"seed": seed, "fingerprint": zlib.crc32(repr([prompt.tokens for prompt in prompts]).encode())}
        self._start(epoch=0, position=0)

    def next_batch(self, n: int) -> list[Prompt]:
        batch = []
        for _ in range(n):
            if self._position == len(self.prompts):
                self._start(self._epoch + 1, position=0)
            batch.append(self.prompts[self._order[self._position]])
            self._position += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position, **self._identity}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises DataError if the state was saved with other prompts or another seed."""
        if not self._identity.items() <= state.items():
            raise DataError(
                "the checkpoint was made with other prompts or another seed; resume with the same data.* and "
                "train.seed, or start a new run"
            )
        self._start(state["epoch"], state["position"])

    def _start(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = list(range(len(self.prompts)))
        random.Random(f"{self._identity['seed']}/{epoch}").shuffle(self._order)


@dataclass(frozen=True)
class _Line:
    """One checked line of a JSONL file."""

    where: str  # "file:line"
    fields: dict[str, Any]

    def known_text(self, field: str, tokenizer: Tokenizer) -> str:
        """The text of a field. Raises DataError for a word that the model would see as "unknown"."""
        if word := tokenizer.first_unknown(self.fields[field]):
            raise DataError(
                f"{self.where}: the tokenizer has no token for {word!r} in {field}; use words that it has, or a model "
                "whose tokenizer has this one"
            )
        return self.fields[field]

    def to_prompt(self, config: DataConfig, tokenizer: Tokenizer) -> Prompt:
        question = self.fields["prompt"]
        if isinstance(question, str):  # messages need a chat template; such tokenizers fall back on bytes
            self.known_text("prompt", tokenizer)
        elif config.prompt_style == "plain":
            raise DataError(
                f"{self.where}: prompt is a list of messages; write a string, or set data.prompt_style=chat"
            )
        tokens = tokenizer.render(question, config.prompt_style)
        return Prompt(
            id=self.fields["id"],
            tokens=tuple(tokens),
            answer=self.fields.get("answer", ""),
            subset=self.fields.get("subset", "all"),
            text=tokenizer.decode(tokens),
            metadata={name: value for name, value in self.fields.items() if name not in PROMPT_FIELDS},
        )


def _puzzle_prompt(puzzle: knights_and_knaves.Puzzle, config: DataConfig, tokenizer: Tokenizer) -> Prompt:
    tokens = tokenizer.render(knights_and_knaves.question_text(puzzle, config.prompt_style), config.prompt_style)
    answer = knights_and_knaves.answer_text(puzzle)
    return Prompt(puzzle.id, tuple(tokens), answer, puzzle.subset, text=tokenizer.decode(tokens))


def _gold_response(prompt: Prompt, puzzle: knights_and_knaves.Puzzle) -> str:
    trace = knights_and_knaves.gold_trace(puzzle)
    return trace.removeprefix("<think>") if knights_and_knaves.opens_thinking(prompt.text) else trace


def _split_lines(lines: list[_Line], config: DataConfig, split: str) -> list[_Line]:
    """The held-out end of a JSONL source ("test"), or the lines before it ("train")."""
    held_out = 0 if config.eval_source else min(config.eval_size, len(lines) // HELD_OUT_SHARE)
    if split == "test" and not held_out:
        raise DataError(
            f"{config.source}: {len(lines)} lines are too few to hold one out; set data.eval_source, or add lines"
        )

    def content(line: _Line) -> str:
        return json.dumps(line.fields["prompt"], sort_keys=True)

    train, test = lines[: len(lines) - held_out], lines[len(lines) - held_out :]
    asked = {content(line) for line in test}
    return test if split == "test" else [line for line in train if content(line) not in asked]


def _read_jsonl(path: Path, target: str) -> list[_Line]:
    """The lines of a file with "prompt" and `target` on each. Raises DataError "file:line: problem; remedy"."""
    if not path.is_file():
        raise DataError(f'{path}: no such file; give a JSONL file with "prompt" and "{target}" on each line')
    try:
        texts = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    lines: dict[str, _Line] = {}
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        line = _check_line(f"{path}:{number}", text, target)
        key = line.fields.setdefault("id", f"{path.stem}/{number}")
        if key in lines:
            first = lines[key].where.rpartition(":")[2]
            raise DataError(f"{line.where}: id {key!r} is also on line {first}; make it unique")
        lines[key] = line
    if not lines:
        raise DataError(f'{path}: no lines; write one object with "prompt" and "{target}" on each line')
    return list(lines.values())


def _check_line(where: str, text: str, target: str) -> _Line:
    example = f'write an object with "prompt" and "{target}"'
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}); {example}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a {type(fields).__name__}, not an object; {example}")
    for key in ("prompt", target):
        if key not in fields:
            raise DataError(f'{where}: no "{key}"; {example}')
    if not (isinstance(fields["prompt"], str) and fields["prompt"].strip()) and not _is_chat(fields["prompt"]):
        raise DataError(
            f'{where}: "prompt" must be a non-empty string or a list of {{"role": ..., "content": ...}} messages'
        )
    fields["answer"] = _number_as_text(fields.get("answer", ""))
    for key in ("answer", "response", "subset", "id"):
        if key in fields and not isinstance(fields[key], str):
            form = "a string or a finite number" if key == "answer" else "a string"
            raise DataError(f'{where}: "{key}" is {json.dumps(fields[key])}; write {form}')
        if key == target and not fields[key].strip():
            raise DataError(f'{where}: "{key}" is empty; write text, or remove the line')
    return _Line(where, fields)


def _number_as_text(value: Any) -> Any:
    """A finite JSON number without an exponent, which math-verify would read as the constant e; others unchanged."""
    if type(value) not in (int, float) or not math.isfinite(value):
        return value
    return format(Decimal(str(value)), "f")


def _is_chat(prompt: Any) -> bool:
    def is_message(message: Any) -> bool:
        return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))

    return isinstance(prompt, list) and bool(prompt) and all(map(is_message, prompt))
