"""Many prompts in little memory: token ids in one array, a `Prompt` made when it is asked for."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from rlad_megatron.data.sources import place
from rlad_megatron.errors import DataError
from rlad_megatron.types import Prompt

REPR_PROMPTS = 1000  # whose tokens are written out at a time


@dataclass
class PromptTable:
    """Grows row by row. decode: makes the text of a prompt from its tokens."""

    decode: Callable[[list[int]], str]
    tokens: array = field(default_factory=lambda: array("i"))  # of all prompts
    ends: array = field(default_factory=lambda: array("q", [0]))  # prompt i has tokens[ends[i] : ends[i + 1]]
    ids: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    subsets: list[str] = field(default_factory=list)
    metadata: dict[int, dict[str, Any]] = field(default_factory=dict)  # of prompts that have some
    files: list[str] = field(default_factory=list)
    places: array = field(default_factory=lambda: array("i"))  # index of the file and row, two for each prompt

    def __len__(self) -> int:
        return len(self.ids)

    def add(
        self,
        tokens: Sequence[int],
        *,
        id: str,
        answer: str,
        subset: str,
        metadata: dict[str, Any] | None = None,
        file: str = "",
        number: int = 0,
    ) -> None:
        if metadata:
            self.metadata[len(self)] = metadata
        if not self.files or self.files[-1] != file:
            self.files.append(file)
        self.places.extend((len(self.files) - 1, number))
        self.tokens.extend(tokens)
        self.ends.append(len(self.tokens))
        self.ids.append(id)
        self.answers.append(answer)
        self.subsets.append(self.subsets[-1] if self.subsets and self.subsets[-1] == subset else subset)

    def where(self, row: int) -> str:
        return place(self.files[self.places[2 * row]], self.places[2 * row + 1])

    def check_ids(self) -> None:
        """Raise DataError if two prompts have the same id."""
        first: dict[str, int] = {}
        for row, id in enumerate(self.ids):
            if first.setdefault(id, row) != row:
                raise DataError(f"{self.where(row)}: id {id!r} is also at {self.where(first[id])}; make it unique")


class Prompts(Sequence[Prompt]):
    """Some prompts of a table."""

    def __init__(self, table: PromptTable, rows: np.ndarray) -> None:
        """rows: int64 indices into the table."""
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> Prompts: ...

    def __getitem__(self, index: int | slice) -> Prompt | Prompts:
        if isinstance(index, slice):
            return Prompts(self._table, self._rows[index])
        table, row = self._table, int(self._rows[index])
        tokens = self._tokens(row)
        return Prompt(
            id=table.ids[row],
            tokens=tuple(tokens),
            answer=table.answers[row],
            subset=table.subsets[row],
            text=table.decode(tokens),
            metadata=table.metadata.get(row, {}),
        )

    def _tokens(self, row: int) -> list[int]:
        return self._table.tokens[self._table.ends[row] : self._table.ends[row + 1]].tolist()

    @property
    def ids(self) -> list[str]:
        return [self._table.ids[row] for row in self._rows.tolist()]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [prompts], in tokens."""
        return np.diff(np.frombuffer(self._table.ends, dtype=np.int64))[self._rows]

    @property
    def subsets(self) -> list[str]:
        return [self._table.subsets[row] for row in self._rows.tolist()]

    def where(self, index: int) -> str:
        """The file and row that a prompt is from, for errors."""
        return self._table.where(int(self._rows[index]))

    def select(self, which: np.ndarray) -> Prompts:
        """The prompts at these indices, or where a mask is true."""
        return Prompts(self._table, self._rows[which])

    def contents(self) -> Iterator[bytes]:
        """The tokens of each prompt, as bytes that can be compared."""
        for row in self._rows.tolist():
            yield self._table.tokens[self._table.ends[row] : self._table.ends[row + 1]].tobytes()

    def fingerprint(self) -> int:
        """crc32 of repr([prompt.tokens for prompt in self]), which is in checkpoints, without making that text."""
        crc, separator = zlib.crc32(b"["), ""
        for start in range(0, len(self), REPR_PROMPTS):
            rows = self._rows[start : start + REPR_PROMPTS].tolist()
            crc = zlib.crc32((separator + repr([tuple(self._tokens(row)) for row in rows])[1:-1]).encode(), crc)
            separator = ", "
        return zlib.crc32(b"]", crc)
