"""Wall-clock seconds of each phase of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimers:
    """`with timers("rollout"): ...` adds wall-clock seconds to a phase; `timers.pop()` returns and clears them.

    Args:
        synchronize: waits for the device's queued work (`platform.synchronize`). Called at both ends of a phase, so
            that the phase that queued the work is charged for it.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - start

    def pop(self) -> dict[str, float]:
        """`{"time/rollout": seconds, ...}` since the last pop, summed over the runs of a phase."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{phase}": value for phase, value in seconds.items()}

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()
