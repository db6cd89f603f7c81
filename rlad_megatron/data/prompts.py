"""Prompts for training and evaluation, traces for fine-tuning, and the order in which prompts are used."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from rlad_megatron.config import DataConfig, SftConfig
from rlad_megatron.data import knights_and_knaves
from rlad_megatron.data.knights_and_knaves import Puzzle
from rlad_megatron.data.presets import KNIGHTS_AND_KNAVES, Source, eval_source, train_source
from rlad_megatron.data.rows import Asked
from rlad_megatron.data.sources import Row, read_rows
from rlad_megatron.data.table import Prompts, PromptTable
from rlad_megatron.data.tokenizers import Question, Tokenizer
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.types import Prompt

TRAIN, TEST = "train", "test"
DROPPED_SHARE = 10  # at most one in this many prompts may be too long
HELD_OUT_SHARE = 10  # at most one in this many rows of a source is held out
BATCH = 1000  # questions that are rendered and tokenised at a time

T = TypeVar("T")


@dataclass(frozen=True)
class Splits:
    """The prompts of a run by split."""

    train: Prompts
    test: Prompts
    skipped: int = 0  # training prompts that are held out too, and so left out
    complete: bool = True  # whether they are all that the sources have

    def items(self) -> list[tuple[str, Prompts]]:
        return [(TRAIN, self.train), (TEST, self.test)]


def build_splits(config: DataConfig, tokenizer: Tokenizer, first: int | None = None) -> Splits:
    """The prompts of both splits, rendered and tokenised. Deterministic in `config`. Reads each source once.

    Test prompts come from `eval_source` or the preset's test split, else from the held-out part of the source. That
    part is puzzles that differ from every training puzzle, or the last rows (`eval_size`, at most a tenth of them);
    training then skips their prompts wherever else they occur.

    first: read only so many rows of each source, as if it had no more.
    Raises DataError for a missing or malformed file, ConfigError for fields that do not fit.
    """
    if config.source == KNIGHTS_AND_KNAVES:
        few = replace(config, train_size=min(first or config.train_size, config.train_size))
        test, more = _test_prompts(config, tokenizer, first)
        return Splits(_puzzle_prompts(few, tokenizer, TRAIN), test, complete=few == config and not more)
    source, apart = train_source(config), eval_source(config) is not None
    rows = _Limited(read_rows(source), first)
    prompts = _table(rows, source, config, tokenizer)
    more = rows.more
    if apart:
        test, more_test = _test_prompts(config, tokenizer, first)
        return Splits(prompts, test, complete=not (more or more_test))
    kept = len(prompts) - _held_out(len(prompts), config)
    train, test = prompts[:kept], prompts[kept:]
    asked = set(test.contents())
    new = train.select(np.fromiter((content not in asked for content in train.contents()), bool, len(train)))
    return Splits(new, test, skipped=len(train) - len(new), complete=not more)


def build_prompts(config: DataConfig, tokenizer: Tokenizer, split: str) -> Prompts:
    """The prompts of one split, "train" or "test". Otherwise as `build_splits`."""
    if split == TRAIN:
        return build_splits(config, tokenizer).train
    if eval_source(config) is not None or config.source == KNIGHTS_AND_KNAVES:
        return _test_prompts(config, tokenizer)[0]
    source, count = train_source(config), 0
    last: deque[Row] = deque(maxlen=config.eval_size)
    for row in read_rows(source):
        count += 1
        last.append(row)
    held_out = _held_out(count, config)
    return _table(list(last)[len(last) - held_out :], source, config, tokenizer)


def training_questions(config: DataConfig) -> Iterator[tuple[str, Question]]:
    """The id of each training prompt and its question, before it is rendered, with the source's template and system
    message. Also those of rows that are held out of the source. Raises as `build_splits`.
    """
    if config.source == KNIGHTS_AND_KNAVES:
        for puzzle in knights_and_knaves.generate_puzzles(config, TRAIN):
            yield puzzle.id, knights_and_knaves.question_text(puzzle, config.prompt_style)
        return
    source = train_source(config)
    for row in read_rows(source):
        asked = Asked(row, source)
        yield asked.id, asked.question


def _test_prompts(config: DataConfig, tokenizer: Tokenizer, first: int | None = None) -> tuple[Prompts, bool]:
    """The test prompts that are not a part of a source for training, and whether there are more."""
    source = eval_source(config)
    if source is None:
        return _puzzle_prompts(config, tokenizer, TEST), False
    rows = _Limited(read_rows(source, default_split=TEST), first)
    return _table(rows, source, config, tokenizer), rows.more


def _held_out(count: int, config: DataConfig) -> int:
    held_out = min(config.eval_size, count // HELD_OUT_SHARE)
    if config.eval_size and not held_out:
        raise DataError(
            f"{config.source}: {count} lines are too few to hold one out; set data.eval_source, or add lines"
        )
    return held_out


class _Limited(Iterator[T]):
    """At most `limit` of the items, or all; afterwards `more` says whether there are others."""

    def __init__(self, items: Iterable[T], limit: int | None) -> None:
        self._items, self._left, self.more = iter(items), limit or sys.maxsize, False

    def __next__(self) -> T:
        if not self._left:
            self.more = next(self._items, None) is not None
            raise StopIteration
        self._left -= 1
        return next(self._items)


def _table(rows: Iterable[Row], source: Source, config: DataConfig, tokenizer: Tokenizer) -> Prompts:
    table = PromptTable(tokenizer.decode)
    for asked, tokens in _tokenised((Asked(row, source) for row in rows), config, tokenizer):
        table.add(
            tokens,
            id=asked.id,
            answer=asked.answer,
            subset=asked.subset,
            metadata=asked.metadata,
            file=asked.row.file,
            number=asked.row.number,
        )
    table.check_ids()
    return Prompts(table, np.arange(len(table)))


def _tokenised(rows: Iterable[Asked], config: DataConfig, tokenizer: Tokenizer) -> Iterator[tuple[Asked, list[int]]]:
    """Rows with the tokens of their questions. Shows how many there have been, on a terminal."""
    columns = TextColumn("prompts read: {task.completed:,.0f}"), TimeElapsedColumn()
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar, ThreadPoolExecutor(1) as pool:
        task = bar.add_task("prompts", total=None)
        # Tokenising one batch leaves Python free to read the next one.
        done: Future[list[list[int]]] | None = None
        rows, before = iter(rows), list[Asked]()
        while batch := list(islice(rows, BATCH)):
            for row in batch:
                _check_question(row, config, tokenizer)
            begun = pool.submit(_rendered, [row.question for row in batch], config, tokenizer)
            if done is not None:
                yield from zip(before, done.result(), strict=True)
            before, done = batch, begun
            bar.advance(task, len(batch))
        if done is not None:
            yield from zip(before, done.result(), strict=True)


def _check_question(row: Asked, config: DataConfig, tokenizer: Tokenizer) -> None:
    if isinstance(row.question, str):  # messages need a chat template; such tokenizers fall back on bytes
        _check_known(row, "prompt", row.question, tokenizer)
    elif config.prompt_style == "plain":
        raise DataError(f"{row.row.where}: prompt is a list of messages; write a string, or set data.prompt_style=chat")


def _rendered(questions: Sequence[Question], config: DataConfig, tokenizer: Tokenizer) -> list[list[int]]:
    return tokenizer.render_all(questions, config.prompt_style, config.chat_template_kwargs)


def _check_known(row: Asked, field: str, text: str, tokenizer: Tokenizer) -> None:
    """Raise DataError for a word that the model would see as "unknown"."""
    if word := tokenizer.first_unknown(text):
        raise DataError(
            f"{row.row.where}: the tokenizer has no token for {word!r} in {field}; use words that it has, or a model "
            "whose tokenizer has this one"
        )


def _puzzle_prompts(config: DataConfig, tokenizer: Tokenizer, split: str) -> Prompts:
    table = PromptTable(tokenizer.decode)
    for puzzle, tokens in _tokenised_puzzles(config, tokenizer, split):
        table.add(tokens, id=puzzle.id, answer=knights_and_knaves.answer_text(puzzle), subset=puzzle.subset)
    return Prompts(table, np.arange(len(table)))


def _tokenised_puzzles(config: DataConfig, tokenizer: Tokenizer, split: str) -> Iterator[tuple[Puzzle, list[int]]]:
    puzzles = knights_and_knaves.generate_puzzles(config, split)
    questions = [knights_and_knaves.question_text(puzzle, config.prompt_style) for puzzle in puzzles]
    return zip(puzzles, _rendered(questions, config, tokenizer), strict=True)


def build_traces(
    config: DataConfig, sft: SftConfig, tokenizer: Tokenizer, first: int | None = None
) -> list[tuple[Prompt, list[int]]]:
    """Prompts and the response tokens to learn, including end of sequence.

    They come from the JSONL file `sft.traces` ("prompt" and "response" on each line) if it is set, else they are gold
    traces of the training puzzles. A "<think>" that the chat template has opened already is left out. first: at most so
    many. Raises as `build_splits` does.
    """
    if sft.traces:
        source = Source("sft.traces", sft.traces)
        rows = islice(read_rows(source, required=("prompt", "response")), first)
        pairs = []
        for row, tokens in _tokenised((Asked(row, source, "response") for row in rows), config, tokenizer):
            _check_known(row, "response", row.target, tokenizer)
            text, trace = tokenizer.decode(tokens), row.target
            if knights_and_knaves.opens_thinking(text):
                trace = trace.removeprefix("<think>")
            pairs.append((Prompt(row.id, tuple(tokens), row.answer, row.subset, text, row.metadata), trace))
    elif config.source == KNIGHTS_AND_KNAVES:
        few = replace(config, train_size=min(first or config.train_size, config.train_size))
        pairs = [_gold_trace(puzzle, tokens, tokenizer) for puzzle, tokens in _tokenised_puzzles(few, tokenizer, TRAIN)]
    else:
        raise ConfigError(
            f"sft.traces is empty and data.source={config.source} has no gold traces; set sft.traces to a JSONL file "
            'with "prompt" and "response"'
        )
    return [(prompt, [*tokenizer.encode(response), tokenizer.eos_ids[0]]) for prompt, response in pairs]


def _gold_trace(puzzle: Puzzle, tokens: list[int], tokenizer: Tokenizer) -> tuple[Prompt, str]:
    text, trace = tokenizer.decode(tokens), knights_and_knaves.gold_trace(puzzle)
    if knights_and_knaves.opens_thinking(text):
        trace = trace.removeprefix("<think>")
    return Prompt(puzzle.id, tuple(tokens), knights_and_knaves.answer_text(puzzle), puzzle.subset, text), trace


def without_held_out(
    traces: Sequence[tuple[Prompt, list[int]]], config: DataConfig, tokenizer: Tokenizer
) -> list[tuple[Prompt, list[int]]]:
    """The traces whose prompts are not held out for evaluation. Raises as `build_splits`."""
    held_out = {prompt.tokens for prompt in build_prompts(config, tokenizer, TEST)}
    return [(prompt, response) for prompt, response in traces if prompt.tokens not in held_out]


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

    def __init__(self, prompts: Prompts, seed: int):
        self.prompts = prompts
        self._identity = {"seed": seed, "fingerprint": prompts.fingerprint()}
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
