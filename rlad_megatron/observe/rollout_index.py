"""Sample rollouts of a run, found by step, subset, result and text. Only their place in the files is held in memory.

What a list shows stands before the tokens in a line (`write_rollouts`), and is read without them: a response of 16,000
tokens has 60 kB of text and 1.8 MB of figures.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

EXCERPT = 12  # words at the end of a response, in a list
NEWEST_FILES = 3  # may still be written, and are read again if they have changed
# In a line of JSON a quote within a text is escaped, so these stand only where a value begins.
FIGURES, TOKENS = b', "prompt_tokens": ', b', "response_tokens": ['

Version = tuple[int, int, int]  # of a file


@dataclass(frozen=True)
class Entry:
    """A rollout in a list."""

    step: int
    id: str
    subset: str
    reward: float
    solved: bool
    finish_reason: str
    tokens: int
    excerpt: str  # its end
    file: str
    number: int  # of its line, from 0


@dataclass(frozen=True)
class Filter:
    """Which rollouts to list; an empty field takes all."""

    text: str = ""  # in prompt, response or id, in any case
    step: int | None = None
    solved: bool | None = None
    subset: str | None = None

    def takes(self, entry: Entry) -> bool:
        """Apart from the text."""
        return (
            (self.step is None or entry.step == self.step)
            and (self.solved is None or entry.solved == self.solved)
            and (self.subset is None or entry.subset == self.subset)
        )


class Place(NamedTuple):
    """Bytes of a file: where a line starts, where its figures do, and where it ends."""

    start: int
    figures: int
    end: int


class File(NamedTuple):
    version: Version
    entries: list[Entry]
    places: list[Place]  # of the entries


class RolloutIndex:
    """The rollouts in `run_dir/rollouts/`, which a run writes step by step. For one thread at a time.

    A file with a line that cannot be read is left out.

    steps: read the files of at most so many steps, evenly spread with the first and the last; None: of all.
    """

    def __init__(self, run_dir: Path, steps: int | None = None) -> None:
        self.version = 0  # grows whenever there are other rollouts than before
        self._folder, self._steps = run_dir / "rollouts", steps
        self._files: dict[str, File] = {}
        self._left_out: dict[str, tuple[Version, str]] = {}  # files, and why
        self._text_matches: tuple[str, dict[str, set[int]]] = "", {}  # the last text, and the lines with it by file

    def poll(self, *, all_files: bool = False, seconds: float = math.inf) -> None:
        """Look for new files and for changes of the newest.

        all_files: for changes of any; a resumed run rewrites some.
        seconds: after so many, leave files that are not among the newest to the next call.
        """
        stop = time.monotonic() + seconds
        names = self._names()
        known = self._files.keys() | self._left_out.keys()
        for name in known if all_files else known - set(names):
            if _version(self._folder / name) != self._version_read(name):
                self._forget(name)
        for place, name in enumerate(reversed(names)):
            if place < NEWEST_FILES or not self._version_read(name):
                if place >= NEWEST_FILES and time.monotonic() > stop:
                    break
                self._read(name)

    @property
    def count(self) -> int:
        return sum(len(file.entries) for file in self._files.values())

    @property
    def subsets(self) -> list[str]:
        return sorted({entry.subset for file in self._files.values() for entry in file.entries})

    @property
    def problems(self) -> list[str]:
        """Why files are left out."""
        return [f"Left out: {why}" for _, (_, why) in sorted(self._left_out.items())]

    def page(self, wanted: Filter, start: int, size: int) -> tuple[int, list[dict[str, Any]]]:
        """How many rollouts there are, and `size` of them from number `start`, as `Entry`; the newest step first."""
        matches = self._matches(wanted.text.casefold()) if wanted.text else None
        found = [
            entry
            for name in sorted(self._files, reverse=True)
            for entry in self._files[name].entries
            if wanted.takes(entry) and (matches is None or entry.number in matches[name])
        ]
        return len(found), [asdict(entry) for entry in found[start : start + size]]

    def by_number(self) -> list[dict[str, Any]]:
        """`Entry` of all: the first rollout of each step, then the second of each, and so on."""
        found = [entry for name in sorted(self._files) for entry in self._files[name].entries]
        return [asdict(entry) for entry in sorted(found, key=lambda entry: entry.number)]

    def get(self, file: str, number: int) -> dict[str, Any] | None:
        """A whole rollout by its place, as `write_rollouts` wrote it; None if there is none, or the file has changed.

        Also None for a line that is not JSON behind what lists show; its file is left out from then on.
        """
        # Only names that were listed: the place comes from a browser.
        if file not in self._files or not 0 <= number < len(self._files[file].places):
            return None
        place = self._files[file].places[number]
        lines = self._parts(file, [(place.start, place.end)])
        try:
            return _parsed(lines[0]) if lines else None
        except ValueError as error:
            self._leave_out(file, self._files[file].version, number, error)
            return None

    def _names(self) -> list[str]:
        names = sorted(path.name for path in self._folder.glob("step_*.jsonl"))
        if self._steps is None or len(names) <= self._steps:
            return names
        return [names[round(i * (len(names) - 1) / (self._steps - 1))] for i in range(self._steps)]

    def _matches(self, text: str) -> dict[str, set[int]]:
        """The lines with this text by file. What was searched for the same text before is kept."""
        if self._text_matches[0] != text:
            self._text_matches = text, {}
        matches = self._text_matches[1]
        for name in self._files.keys() - matches.keys():
            heads = self._parts(name, [(place.start, place.figures) for place in self._files[name].places])
            matches[name] = {
                number
                for number, rollout in enumerate(map(_head, heads))
                if text in f"{rollout['prompt']}\n{rollout['response']}\n{rollout.get('id', '')}".casefold()
            }
        return matches

    def _parts(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Ranges of bytes of a file; none if it is another one than was read."""
        parts = []
        try:
            with (self._folder / name).open("rb") as file:
                if _version(file.fileno()) != self._files[name].version:
                    return []
                for start, end in ranges:
                    file.seek(start)
                    parts.append(file.read(end - start))
        except FileNotFoundError:
            return []
        return parts

    def _read(self, name: str) -> None:
        try:
            with (self._folder / name).open("rb") as file:
                version = _version(file.fileno())
                if version is None or version == self._version_read(name):
                    return
                text = file.read()
        except FileNotFoundError:
            return
        self._forget(name)
        entries, places, start = list[Entry](), list[Place](), 0
        while (end := text.find(b"\n", start)) >= 0:  # without a line that is still being written
            figures = text.find(FIGURES, start, end)
            places.append(Place(start, figures if figures >= 0 else end, end))
            number, start = len(entries), end + 1
            try:
                entries.append(_entry(text, places[-1], name, number))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                self._leave_out(name, version, number, error)
                return
        self._files[name] = File(version, entries, places)

    def _version_read(self, name: str) -> Version | None:
        if name in self._left_out:
            return self._left_out[name][0]
        return self._files[name].version if name in self._files else None

    def _forget(self, name: str) -> None:
        self.version += 1
        for known in (self._files, self._left_out, self._text_matches[1]):
            known.pop(name, None)

    def _leave_out(self, name: str, version: Version, number: int, error: Exception) -> None:
        self._forget(name)
        why = f"{self._folder / name}, line {number + 1} is no rollout ({error!r}); remove the line"
        self._left_out[name] = version, why


def _version(file: Path | int) -> Version | None:
    """What identifies a file and its content; None if it is missing."""
    try:
        stat = os.stat(file)
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _parsed(line: bytes) -> dict[str, Any]:
    return json.loads(line, parse_constant=lambda _: None)  # browsers know no NaN


def _head(line: bytes) -> dict[str, Any]:
    """What a line has before its figures. An earlier version wrote lines without any."""
    return _parsed(line if line.endswith(b"}") else line + b"}")


def _entry(text: bytes, place: Place, file: str, number: int) -> Entry:
    """Of a line of a file. Copies only its head."""
    if text[place.end - 1 : place.end] != b"}":
        raise ValueError("its end is missing")
    rollout = _head(text[place.start : place.figures])
    start = text.find(TOKENS, place.start, place.end) + len(TOKENS)
    end = text.find(b"]", start, place.end) if start >= len(TOKENS) else start
    return Entry(
        step=int(rollout["step"]),
        id=str(rollout.get("id", "")),
        subset=rollout.get("subset", ""),
        reward=float(rollout["reward"]),
        solved=rollout.get("solved", False),
        finish_reason=rollout.get("finish_reason", ""),
        tokens=text.count(b",", start, end) + 1 if end > start else 0,
        excerpt=" ".join(rollout["response"].rsplit(maxsplit=EXCERPT)[-EXCERPT:]),
        file=file,
        number=number,
    )
