"""Sample rollouts of a run, found by step, subset, result and text. Only their place in the files is held in memory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlad_megatron.errors import DataError

EXCERPT = 12  # words at the end of a response, in a list
NEWEST_FILES = 3  # may still be written, and are read again if they have changed


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
    subset: str = ""

    def takes(self, entry: Entry) -> bool:
        """Apart from the text."""
        return (
            (self.step is None or entry.step == self.step)
            and (self.solved is None or entry.solved == self.solved)
            and (not self.subset or entry.subset == self.subset)
        )


class RolloutIndex:
    """The rollouts in `run_dir/rollouts/`, which a run writes step by step. For one thread at a time."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "rollouts"
        self._files: dict[str, tuple[tuple[int, int, int], list[Entry]]] = {}  # what identifies a version, its entries
        self._text_matches: tuple[str, dict[str, set[int]]] = "", {}  # the last text, and the lines with it by file

    def poll(self, *, all_files: bool = False) -> None:
        """Look for new files and for changes of the newest; with `all_files` of any (a resumed run rewrites some)."""
        names = sorted(path.name for path in self._folder.glob("step_*.jsonl"))
        for gone in self._files.keys() - names:
            del self._files[gone]
        newest = set(names[-NEWEST_FILES:])
        for name in names:
            if all_files or name in newest or name not in self._files:
                self._read(name)

    @property
    def count(self) -> int:
        return sum(len(entries) for _, entries in self._files.values())

    @property
    def subsets(self) -> list[str]:
        return sorted({entry.subset for _, entries in self._files.values() for entry in entries})

    def page(self, wanted: Filter, start: int, size: int) -> tuple[int, list[dict[str, Any]]]:
        """How many rollouts there are, and `size` of them from number `start`, as `Entry`; the newest step first."""
        matches = self._matches(wanted.text.casefold()) if wanted.text else None
        found = [
            entry
            for name in sorted(self._files, reverse=True)
            for entry in self._files[name][1]
            if wanted.takes(entry) and (matches is None or entry.number in matches[name])
        ]
        return len(found), [asdict(entry) for entry in found[start : start + size]]

    def spread(self, steps: int) -> list[dict[str, Any]]:
        """`Entry` of the rollouts of at most so many steps, evenly spread with the first and the last: the first
        rollout of each step, then the second of each, and so on.
        """
        names = sorted(self._files)
        if len(names) > steps:
            names = [names[round(i * (len(names) - 1) / (steps - 1))] for i in range(steps)]
        found = [entry for name in names for entry in self._files[name][1]]
        return [asdict(entry) for entry in sorted(found, key=lambda entry: entry.number)]

    def get(self, file: str, number: int) -> dict[str, Any] | None:
        """A whole rollout by its place, as `write_rollouts` wrote it; None if there is none."""
        # Only names that were listed: the place comes from a browser.
        if file not in self._files or not 0 <= number < len(lines := self._lines(file)):
            return None
        return lines[number]

    def _matches(self, text: str) -> dict[str, set[int]]:
        """The lines with this text by file. What was searched for the same text before is kept."""
        if self._text_matches[0] != text:
            self._text_matches = text, {}
        matches = self._text_matches[1]
        for name in self._files.keys() - matches.keys():
            matches[name] = {
                number
                for number, rollout in enumerate(self._lines(name))
                if text in f"{rollout['prompt']}\n{rollout['response']}\n{rollout['id']}".casefold()
            }
        return matches

    def _read(self, name: str) -> None:
        try:
            stat = (self._folder / name).stat()
        except FileNotFoundError:
            return
        version = stat.st_ino, stat.st_size, stat.st_mtime_ns
        if name in self._files and self._files[name][0] == version:
            return
        entries = [_entry(rollout, name, number) for number, rollout in enumerate(self._lines(name))]
        self._files[name] = version, entries
        self._text_matches[1].pop(name, None)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """The rollouts of a file, without a line that is still being written."""
        path = self._folder / name
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
            return [json.loads(line, parse_constant=lambda _: None) for line in lines]  # browsers know no NaN
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise DataError(f"{path} has a line that is not JSON ({error}); remove the line") from error


def _entry(rollout: dict[str, Any], file: str, number: int) -> Entry:
    response = rollout["response"]
    return Entry(
        step=rollout["step"],
        id=str(rollout.get("id", "")),
        subset=rollout.get("subset", ""),
        reward=rollout["reward"],
        solved=rollout.get("solved", False),
        finish_reason=rollout.get("finish_reason", ""),
        tokens=len(rollout.get("response_tokens", ())),
        excerpt=" ".join(response.split()[-EXCERPT:]),
        file=file,
        number=number,
    )
