"""SIGINT and SIGTERM: the first asks the run to stop, the second ends it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, where nothing can stop by itself."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Signals:
    """What has arrived."""

    first: int | None = None


@contextmanager
def stop_signals(ask: Callable[[], bool] = lambda: False) -> Iterator[Signals]:
    """Within the block, the first signal calls `ask`, which asks the run to stop and returns whether it will.

    If not, and at the second signal, the block raises Interrupted. After that signals are ignored, so that nothing
    interrupts the clean-up. A SIGINT that is ignored, as in the background jobs of a script, stays so.
    """
    signals = Signals()

    def handle(signum: int, frame: object) -> None:
        is_first, signals.first = signals.first is None, signals.first or signum
        if not (is_first and ask()):
            for number in before:
                signal.signal(number, signal.SIG_IGN)
            raise Interrupted(signum)

    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
