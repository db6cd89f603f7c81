"""A run folder as its page shows it: read once for the report, or followed while the run writes (`rlad watch`)."""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import DataError
from rlad_megatron.observe.advisories import advisories
from rlad_megatron.observe.metrics import METRICS_FILE, parse_metrics
from rlad_megatron.observe.rollout_index import RolloutIndex
from rlad_megatron.observe.summary import summary_rows
from rlad_megatron.observe.tail import Tail
from rlad_megatron.observe.timeline import TIMELINE_FILE

LOAD_SPANS = 300  # of each server's curve
LOAD_EVENTS = 20_000  # the newest changes of a server's load that are kept


class RunFolder:
    """What a run has written so far. For one thread at a time.

    rollout_steps: look at the rollouts of at most so many steps (`RolloutIndex`); None: of all.
    """

    def __init__(self, path: Path, rollout_steps: int | None = None) -> None:
        self.path = path
        self.metrics: list[dict[str, float]] = []
        self.rollouts = RolloutIndex(path, rollout_steps)
        self._tail = Tail(path / METRICS_FILE)
        self._restarts = self._indexed = 0  # of the metrics; those up to which rollouts were looked at again
        self._load: dict[str, ServerLoad] = {}
        self._load_version = 0
        self._summed: tuple[int, list[tuple[str, str]]] = 0, []  # after so many lines of metrics: the summary

    def poll(self, seconds: float = math.inf) -> None:
        """Read what is new. seconds: as in `RolloutIndex.poll`.

        Raises DataError for a whole line that cannot be read; the next call reads it again.
        """
        lines = self._tail.poll()
        if self._tail.restarts != self._restarts:  # a run that was resumed drops its last steps
            self.metrics, self._restarts, self._summed = [], self._tail.restarts, (0, [])
        try:
            self.metrics += parse_metrics(self._tail.path, lines, self._tail.first - 1)
        except DataError:
            self._tail.unread()
            raise
        self.rollouts.poll(all_files=self._indexed != self._restarts, seconds=seconds)
        self._indexed = self._restarts
        for file in (self.path / "timeline").glob("server_*.jsonl"):
            name = file.stem.replace("_", " ")
            if name not in self._load:
                self._load[name] = ServerLoad(file)
            self._load_version += self._load[name].poll()

    def has_all_steps(self, config: RunConfig) -> bool:
        """Whether the run has made as many steps as its configuration asks for."""
        return bool(self.metrics) and self.metrics[-1]["step"] >= config.train.steps

    def _curves(self) -> dict[str, dict[str, list[float]]]:
        return {name: load.curve() for name, load in sorted(self._load.items())}

    def close(self) -> None:
        for tail in (self._tail, *(load.tail for load in self._load.values())):
            tail.close()

    def news(
        self,
        after: int,
        restarts: int,
        config: RunConfig | None,
        disk: tuple[int, int] | None = None,
        load: int = -1,
    ) -> dict[str, Any]:
        """What the page shows, as JSON, without the first `after` lines of metrics.

        after, restarts: `count` and `restarts` of an earlier answer; if the metrics were replaced since, all are sent.
        load: its `load_version`; if that has not changed, `load` is None.
        """
        if restarts != self._restarts:
            after = 0
        if self._summed[0] != len(self.metrics):
            self._summed = len(self.metrics), summary_rows(self.metrics)
        return {
            "after": after,
            "count": len(self.metrics),
            "restarts": self._restarts,
            "metrics": columns(self.metrics[after:]),
            "summary": self._summed[1],
            "advisories": [it.text for it in advisories(self.metrics, config, disk)] + self.rollouts.problems,
            "load_version": self._load_version,
            "load": None if load == self._load_version else self._curves(),
            "rollouts": self.rollouts.count,
            "rollouts_version": self.rollouts.version,
            "subsets": self.rollouts.subsets,
            "timeline": TIMELINE_FILE if (self.path / TIMELINE_FILE).exists() else "",
        }


class ServerLoad:
    """How many responses a server had in flight when, from its file in `timeline/` (observe/timeline.py)."""

    def __init__(self, file: Path) -> None:
        self.tail = Tail(file)
        self._events: deque[tuple[float, float]] = deque(maxlen=LOAD_EVENTS)

    def poll(self) -> bool:
        """Whether there is anything new. Raises DataError for a line that cannot be read, also at the next call."""
        restarts, lines = self.tail.restarts, self.tail.poll()
        if self.tail.restarts != restarts:  # the timeline keeps only the newest steps
            self._events.clear()
        found = []
        for number, line in enumerate(lines, start=self.tail.first):
            try:
                event = json.loads(line)
                found += [(event["time"] + 0.0, event["value"] + 0.0)] if "value" in event else []
            except (ValueError, TypeError, KeyError) as error:
                self.tail.unread()
                raise DataError(f"{self.tail.path}, line {number} is no event ({error!r}); remove the line") from error
        self._events += found
        return bool(lines) or self.tail.restarts != restarts

    def curve(self) -> dict[str, list[float]]:
        """Seconds since the epoch, and the largest and the last value in each of LOAD_SPANS spans of time."""
        if not self._events:
            return {"times": [], "values": []}
        start, width = self._events[0][0], (self._events[-1][0] - self._events[0][0]) / LOAD_SPANS or 1.0
        values: dict[int, list[float]] = defaultdict(list)
        for time, value in self._events:
            values[int((time - start) / width)].append(value)
        curve: dict[str, list[float]] = {"times": [], "values": []}
        for place, of_span in values.items():
            curve["times"] += [round(start + place * width, 2), round(start + (place + 1) * width, 2)]
            curve["values"] += [max(of_span), of_span[-1]]  # the last one holds until the next change
        return curve


def columns(metrics: list[dict[str, float]]) -> dict[str, list[float | None]]:
    """Values of each key in each line, to 5 digits; None where there is none, or none that is finite."""
    keys = dict.fromkeys(key for line in metrics for key in line)
    return {key: [_rounded(line.get(key, math.nan)) for line in metrics] for key in keys}


def _rounded(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.5g}")
