"""A run folder as its page shows it: read once for the report, or followed while the run writes (`rlad watch`)."""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlad_megatron.config import RunConfig
from rlad_megatron.observe.advisories import advisories
from rlad_megatron.observe.metrics import METRICS_FILE, parse_metrics
from rlad_megatron.observe.rollout_index import RolloutIndex
from rlad_megatron.observe.summary import summary_rows
from rlad_megatron.observe.tail import Tail
from rlad_megatron.observe.timeline import TIMELINE_FILE

LOAD_SPANS = 300  # of each server's curve
LOAD_EVENTS = 20_000  # the newest changes of a server's load that are kept


class RunFolder:
    """What a run has written so far. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics: list[dict[str, float]] = []
        self.rollouts = RolloutIndex(path)
        self._tail = Tail(path / METRICS_FILE)
        self._restarts = 0
        self._load: dict[str, ServerLoad] = {}
        self._summed: tuple[int, list[tuple[str, str]]] = 0, []  # after so many lines of metrics: the summary

    def poll(self) -> None:
        """Read what is new. Raises DataError for a whole line that cannot be read."""
        lines = self._tail.poll()
        if restarted := self._tail.restarts != self._restarts:  # a run that was resumed drops its last steps
            self.metrics, self._restarts, self._summed = [], self._tail.restarts, (0, [])
        self.metrics += parse_metrics(self._tail.path, lines, len(self.metrics))
        self.rollouts.poll(all_files=restarted)
        for file in (self.path / "timeline").glob("server_*.jsonl"):
            self._load.setdefault(file.stem.replace("_", " "), ServerLoad(file)).poll()

    def news(
        self,
        after: int,
        restarts: int,
        config: RunConfig | None,
        disk: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """What the page shows, as JSON, without the first `after` lines of metrics.

        after, restarts: `count` and `restarts` of an earlier answer; if the metrics were replaced since, all are sent.
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
            "advisories": [asdict(advisory) for advisory in advisories(self.metrics, config, disk)],
            "load": {name: load.curve() for name, load in sorted(self._load.items())},
            "rollouts": self.rollouts.count,
            "subsets": self.rollouts.subsets,
            "timeline": TIMELINE_FILE if (self.path / TIMELINE_FILE).exists() else "",
        }


class ServerLoad:
    """How many responses a server had in flight when, from its file in `timeline/` (observe/timeline.py)."""

    def __init__(self, file: Path) -> None:
        self._tail = Tail(file)
        self._events: deque[tuple[float, float]] = deque(maxlen=LOAD_EVENTS)

    def poll(self) -> None:
        restarts, lines = self._tail.restarts, self._tail.poll()
        if self._tail.restarts != restarts:  # the timeline keeps only the newest steps
            self._events.clear()
        found = (json.loads(line) for line in lines)
        self._events += [(event["time"], event["value"]) for event in found if "value" in event]

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
