"""What each server, rank, teacher and reward did when: `timeline.json` of a run, and the shares of idle time.

The file is in Chrome's trace event format and opens in https://ui.perfetto.dev. Format:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

TIMELINE_FILE = "timeline.json"
KEEP_STEPS = 50  # the newest steps that timeline.json shows
TEACHER_ROW, REWARDS_ROW = "teacher", "rewards"
# The first word of a row's name, and the process of the trace that holds such rows.
PROCESSES = {"server": "servers", "teacher": "teacher", "trainer": "trainer ranks", "rewards": "rewards"}


@dataclass(frozen=True)
class Span:
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Count:
    name: str
    time: float
    value: float


class Timeline:
    """Spans and counters of this process, by row, and the run's `timeline.json`.

    Rows are "server 0", "teacher", "trainer rank 0", "rewards" and the like (`PROCESSES`). Only one process of a run
    may write to a row. Times are seconds since the epoch (`time.time()`), so the clocks of a run's hosts must agree.
    All methods may be called from any thread.

    `write` appends the events of a step to `run_dir/timeline/<row>.jsonl`, and `merge` makes `run_dir/timeline.json`
    of these files. Both hold only the newest steps: the merged file KEEP_STEPS of them, a row's file less than twice
    as many.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lock = threading.Lock()
        self._events: dict[str, list[Span | Count]] = defaultdict(list)  # since the last write
        self._counters: dict[str, dict[str, Count]] = defaultdict(dict)  # their state at the last write

    def add(self, row: str, name: str, start: float, end: float) -> None:
        """Record that `row` did `name` between two times."""
        with self._lock:
            self._row(row).append(Span(name, start, max(start, end)))  # the system's clock may be set back

    @contextmanager
    def span(self, row: str, name: str) -> Iterator[None]:
        """Record the time that the block takes, also if it raises."""
        start = time.time()
        try:
            yield
        finally:
            self.add(row, name, start, time.time())

    def count(self, row: str, name: str, value: float) -> None:
        """Record that the counter `name` of `row`, 0 at first, has this value from now on."""
        with self._lock:
            self._row(row).append(Count(name, time.time(), value))

    def busy(self, row: str, start: float, end: float) -> float:
        """Seconds between `start` and `end` in which `row` was within a span or one of its counters above 0.

        Knows the spans that have ended and have not been written, so ask before `write`.
        """
        with self._lock:
            events = [*self._counters.get(row, {}).values(), *self._events.get(row, [])]
        intervals: list[tuple[float, float]] = []
        above_zero: dict[str, float] = {}  # since when
        for event in events:
            if isinstance(event, Span):
                intervals.append((event.start, event.end))
            elif event.value > 0:
                above_zero.setdefault(event.name, event.time)
            elif event.name in above_zero:
                intervals.append((above_zero.pop(event.name), event.time))
        return _covered([*intervals, *((since, end) for since in above_zero.values())], start, end)

    def write(self, step: int) -> None:
        """Append the events since the last call to the files of their rows, as those of `step`."""
        with self._lock:
            events, self._events = self._events, defaultdict(list)
            for row, of_row in events.items():
                self._counters[row] |= {event.name: event for event in of_row if isinstance(event, Count)}
        self._folder.mkdir(parents=True, exist_ok=True)
        for row, of_row in events.items():
            with self._path(row).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"row": row, "step": step} | asdict(event)) + "\n" for event in of_row)
        if step % KEEP_STEPS == 0:
            for row in self._counters:  # all that were ever written
                _filter(self._path(row), lambda kept: kept > step - KEEP_STEPS)

    def truncate_after(self, step: int) -> None:
        """On resume, before any rank writes: drop the later steps of all rows, so that no step appears twice."""
        for path in self._folder.glob("*.jsonl"):
            _filter(path, lambda kept: kept <= step)

    def merge(self) -> None:
        """Write `timeline.json` from the files of all rows: the newest KEEP_STEPS steps. Replaces it atomically.

        Times are microseconds since the first event shown. Each kind of row is a process and each row a thread; spans
        that overlap without one holding the other get threads "<row> (2)" and so on, because the format has no place
        for them on one thread.
        """
        lines = [line for path in sorted(self._folder.glob("*.jsonl")) for line in _read(path)]
        newest = max((line["step"] for line in lines), default=0)
        lines = [line for line in lines if line["step"] > newest - KEEP_STEPS]
        path = self._run_dir / TIMELINE_FILE
        temporary = path.with_suffix(".json.tmp")
        events = ",\n".join(map(json.dumps, trace_events(lines)))
        temporary.write_text(f'{{"displayTimeUnit": "ms", "traceEvents": [\n{events}\n]}}\n', encoding="utf-8")
        temporary.replace(path)

    @property
    def _folder(self) -> Path:
        return self._run_dir / "timeline"

    def _path(self, row: str) -> Path:
        return self._folder / f"{row.replace(' ', '_')}.jsonl"

    def _row(self, row: str) -> list[Span | Count]:
        assert row.split()[0] in PROCESSES, row
        return self._events[row]


def server_row(index: int) -> str:
    return f"server {index}"


def idle_shares(
    seconds: float, *, waiting: float, servers: Sequence[float] = (), teacher: float | None = None
) -> dict[str, float]:
    """Shares of a step in which its parts had nothing to do: `idle/trainer`, `idle/servers`, `idle/teacher`.

    Args:
        seconds: of the step.
        waiting: seconds in which the trainer's ranks waited for rollouts or for a teacher on other ranks.
        servers: seconds in which each server had a request in flight; without servers there is no `idle/servers`.
        teacher: seconds in which the teacher computed; None, and no `idle/teacher`, for a run without one.
    """
    shares = {"idle/trainer": waiting / seconds}
    if servers:
        shares["idle/servers"] = 1 - sum(servers) / len(servers) / seconds
    if teacher is not None:
        shares["idle/teacher"] = 1 - teacher / seconds
    return {name: min(max(share, 0.0), 1.0) for name, share in shares.items()}  # two clocks may differ slightly


def trace_events(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trace events of a run from the lines of its rows' files: names first, then spans ("X") and counters ("C")."""
    origin = min((line["start" if "start" in line else "time"] for line in lines), default=0.0)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        rows[line["row"]].append(line)
    # Perfetto has one name for each thread id of the whole trace, and knows a process also as the thread of that id.
    new_thread = count(start=1 + len(PROCESSES)).__next__
    names, events = [], []
    for pid, (kind, process) in enumerate(PROCESSES.items(), start=1):
        of_kind = [row for row in rows if row.split()[0] == kind]
        if of_kind:
            names.append(_name("process_name", process, pid=pid))
        for row in sorted(of_kind, key=lambda row: (len(row), row)):
            lanes = _lanes([line for line in rows[row] if "start" in line]) or [[]]
            tids = [new_thread() for _ in lanes]
            for number, (tid, lane) in enumerate(zip(tids, lanes, strict=True), start=1):
                names.append(_name("thread_name", row if number == 1 else f"{row} ({number})", pid=pid, tid=tid))
                for line in lane:
                    # Both ends are rounded, so that spans which touch or hold each other still do.
                    start, end = (round(1e6 * (line[key] - origin)) for key in ("start", "end"))
                    span = {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": end - start, "name": line["name"]}
                    events.append(span | {"cat": kind, "args": {"step": line["step"]}})
            for line in rows[row]:
                if "value" in line:
                    # A counter belongs to a process; Perfetto calls it "<name> <key of args>".
                    counter = {"ph": "C", "pid": pid, "tid": tids[0], "ts": round(1e6 * (line["time"] - origin))}
                    events.append(counter | {"name": row, "args": {line["name"]: line["value"]}})
    return names + sorted(events, key=lambda event: event["ts"])


def _name(kind: str, name: str, **ids: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, **ids, "args": {"name": name}}


def _lanes(spans: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Spans so divided that any two of a lane are disjoint or one holds the other."""
    lanes: list[list[dict[str, Any]]] = []
    ends: list[list[float]] = []  # of each lane: the ends of the spans that have begun and not ended, outermost first
    for span in sorted(spans, key=lambda span: (span["start"], -span["end"])):
        for of_lane in ends:
            while of_lane and of_lane[-1] <= span["start"]:
                of_lane.pop()
        fitting = (i for i, of_lane in enumerate(ends) if not of_lane or span["end"] <= of_lane[-1])
        number = next(fitting, len(lanes))
        if number == len(lanes):
            lanes.append([])
            ends.append([])
        lanes[number].append(span)
        ends[number].append(span["end"])
    return lanes


def _covered(intervals: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """The length of the intervals' union within [start, end]."""
    seconds = 0.0
    for first, last in sorted(intervals):
        first, last = max(first, start), min(last, end)
        if last > first:
            seconds += last - first
            start = last
    return seconds


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a row's file. Ignores a half-written last one, of a killed rank."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _filter(path: Path, keeps: Callable[[int], bool]) -> None:
    """Keep only the lines of some steps. Replaces the file atomically."""
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in _read(path) if keeps(line["step"]))
    temporary.replace(path)
