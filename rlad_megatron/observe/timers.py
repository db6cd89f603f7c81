"""Wall-clock seconds of each phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlad_megatron.observe.timeline import Timeline

STEP, OTHER = "step", "other"


class PhaseTimers:
    """`with timers("rollout"): ...` adds wall-clock seconds to a phase; `timers.pop()` returns and clears them.

    A second belongs to one phase: the innermost. Only "step" has all its time, and "other" what is left of a step, so
    the phases within a step add up to `time/step`. For the main thread.

    Args:
        synchronize: waits for the device's queued work (`platform.synchronize`). Called at both ends of a phase, so
            that the phase that queued the work is charged for it.
        timeline: also gets each run of a phase as a span of `row`.
    """

    def __init__(self, synchronize: Callable[[], None], timeline: Timeline | None = None, row: str = "") -> None:
        self._synchronize = synchronize
        self._timeline, self._row = timeline, row
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0  # seconds of the phases that have ended within the present one

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer, self._inner = self._inner, 0.0
        start, began = self._now(), time.time()
        try:
            yield
        finally:
            seconds = self._now() - start
            if self._timeline is not None:
                self._timeline.add(self._row, phase, began, time.time())
            self._seconds[OTHER if phase == STEP else phase] += seconds - self._inner
            if phase == STEP:
                self._seconds[STEP] += seconds
            self._inner = outer + seconds

    def pop(self) -> dict[str, float]:
        """`{"time/rollout": seconds, ...}` since the last pop, summed over the runs of a phase."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        return {f"time/{phase}": value for phase, value in seconds.items()}

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()
