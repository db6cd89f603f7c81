"""Seconds per phase of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimers:
    """`with timers("rollout"): ...` adds wall-clock seconds to a phase; `timers.pop()` gives and clears them.

    Args:
        synchronize: called at both ends of a phase, for example `torch.cuda.synchronize`, so that work still queued
            on a device is charged to the phase that queued it. None where the host does the work.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
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
        """`{"time/rollout": seconds, ...}` since the last pop; the sum where a phase ran more than once."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{phase}": value for phase, value in seconds.items()}

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()
