"""A rectangular part of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable


class Box(tuple[tuple[int, int], ...]):
    """(start, stop) in each dimension."""

    __slots__ = ()

    @classmethod
    def at(cls, origin: Iterable[int], sizes: Iterable[int]) -> Box:
        return cls((start, start + size) for start, size in zip(origin, sizes, strict=True))

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Box:
        return cls((0, size) for size in shape)

    @property
    def origin(self) -> tuple[int, ...]:
        return tuple(start for start, _ in self)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """As an index into a tensor."""
        return tuple(slice(start, stop) for start, stop in self)

    def intersect(self, other: Box) -> Box | None:
        """What both cover; None if nothing."""
        common = Box((max(a, c), min(b, d)) for (a, b), (c, d) in zip(self, other, strict=True))
        return common if all(start < stop for start, stop in common) else None

    def shift(self, old: Box, new: Box | None = None) -> Box:
        """This part of `old`, as it lies in `new`, which has the same sizes; by default in a tensor of just `old`."""
        origin = new.origin if new is not None else [0] * len(self)
        return Box.at((a - o + n for (a, _), (o, _), n in zip(self, old, origin, strict=True)), self.sizes)
