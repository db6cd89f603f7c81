"""How Megatron cuts Hugging Face tensors over tensor-parallel ranks. Pure bookkeeping on shapes.

A rule says how the uncut parameter is made of Hugging Face tensors (`uncut`), and which parts of it a rank holds
(`cuts`): checkpoints store uncut parameters. The pieces of a rank's parameter follow (`pieces`). Sizes have names
("hidden", "ffn", ...), so that a family's table holds for every model of the family.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rlad_megatron.models.box import Box
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.loss_memory import padded_vocab_size


@dataclass(frozen=True)
class Piece:
    """One rectangular part of a Megatron parameter and the part of a Hugging Face tensor that equals it."""

    hf_name: str
    hf_slices: Box  # in the Hugging Face tensor
    local_slices: Box  # in the Megatron parameter


@dataclass(frozen=True)
class Rule:
    """How one Megatron parameter is made of Hugging Face tensors, and how it is cut.

    replicated: the same on every rank (norms).
    row_parallel: cut along the input dimension (attention output, feed-forward output).
    vocabulary: rows cut over the padded vocabulary; the padding is in no Hugging Face tensor (embedding, head).
    kv_heads: rows cut, with the tensors interleaved per query group: its query heads, its key, its value. A tensor of
        several parts has them head by head (query, gate, query, gate); the group has them one after the other.
    ranks: the rows of each part of each tensor are cut, so that a rank holds its gate rows, then its up rows.
    """

    cut: Literal["replicated", "row_parallel", "vocabulary", "kv_heads", "ranks"]
    hf: tuple[str, ...]
    rows: tuple[str | tuple[str, ...], ...]  # name of each tensor's output size; of several parts, each one's
    columns: tuple[str, ...] = ()  # names of the sizes after it, which all share
    stored: tuple[str, ...] = ()  # Megatron's checkpoints store the parts one by one, with these endings
    float32: bool = False  # whatever the model's precision
    # The name that Megatron gives a norm's weight, minus 1, in models whose norms are zero-centred; ours is not.
    zero_centered: str = ""

    @property
    def replicated(self) -> bool:
        return self.cut == "replicated"

    def at(self, layer: int, expert: int) -> Rule:
        """The rule with the layer and the expert filled into its Hugging Face names."""
        return replace(self, hf=tuple(name.format(layer=layer, expert=expert) for name in self.hf))

    def hf_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        rest = tuple(map(spec.size, self.columns))
        return {name: (sum(sizes), *rest) for name, sizes in self.part_sizes(spec)}

    def part_sizes(self, spec: ModelSpec) -> list[tuple[str, list[int]]]:
        """Each tensor's name, and the rows of its parts."""
        return [(name, list(map(spec.size, _names(rows)))) for name, rows in zip(self.hf, self.rows, strict=True)]

    def part(self, number: int) -> Rule:
        """The rule of one part, as if the Hugging Face tensor had no other."""
        assert self.cut == "ranks"
        parts = [(name, size) for name, rows in zip(self.hf, self.rows, strict=True) for size in _names(rows)]
        name, size = parts[number]
        return replace(self, hf=(name,), rows=(size,), stored=())

    def uncut(self, spec: ModelSpec) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
        """(shape of the uncut parameter without padding, the pieces it is made of)"""
        rest = tuple(map(spec.size, self.columns))
        pieces, at = [], 0
        for name, start, rows in self._runs(spec):
            pieces.append(Piece(name, _rows(start, (rows, *rest)), _rows(at, (rows, *rest))))
            at += rows
        return (at, *rest), tuple(pieces)

    def _runs(self, spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
        """What the uncut parameter's rows are, from the first on: (tensor, first row in it, rows)."""
        if self.cut != "kv_heads":
            for name, parts in self.part_sizes(spec):
                for number, rows in enumerate(parts):
                    yield name, sum(parts[:number]), rows
            return
        for group in range(spec.num_kv_heads):
            for name, parts in self.part_sizes(spec):
                rows = parts[0] // spec.num_kv_heads
                if len(parts) == 1:
                    yield name, group * rows, rows
                    continue
                heads = range(group * rows // spec.head_dim, (group + 1) * rows // spec.head_dim)
                for part in range(len(parts)):
                    for head in heads:
                        yield name, (head * len(parts) + part) * spec.head_dim, spec.head_dim

    def cuts(self, spec: ModelSpec, tp: int, tp_rank: int) -> tuple[Box, ...]:
        """The parts of the uncut parameter that the rank's parameter consists of, one below the other."""
        (rows, *rest), pieces = self.uncut(spec)
        if self.cut == "replicated":
            return (Box.whole((rows, *rest)),)
        if self.cut == "row_parallel":
            return (Box.at((0, tp_rank * (rest[0] // tp)), (rows, rest[0] // tp)),)
        if self.cut == "vocabulary":
            rows = padded_vocab_size(rows, tp)
        spans = [piece.local_slices[0] for piece in pieces] if self.cut == "ranks" else [(0, rows)]
        widths = [(stop - start) // tp for start, stop in spans]
        return tuple(
            _rows(start + tp_rank * width, (width, *rest)) for (start, _), width in zip(spans, widths, strict=True)
        )

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
        """(shape of the rank's parameter, what it is made of)"""
        _, uncut = self.uncut(spec)
        pieces: list[Piece] = []
        at = 0
        for cut in self.cuts(spec, tp, tp_rank):
            pieces += pieces_in(cut, uncut, _rows(at, cut.sizes))
            at += cut.sizes[0]
        return (at, *cut.sizes[1:]), tuple(pieces)


def pieces_in(part: Box, pieces: Iterable[Piece], place: Box | None = None) -> Iterator[Piece]:
    """The pieces of a part of a parameter, with their position in that part, or in a tensor that has it at `place`."""
    for piece in pieces:
        overlap = part.intersect(piece.local_slices)
        if overlap is not None:
            in_hf = overlap.shift(piece.local_slices, piece.hf_slices)
            yield Piece(piece.hf_name, in_hf, overlap.shift(part, place))


def _rows(start: int, sizes: tuple[int, ...]) -> Box:
    """Rows from `start` on, whole in the other dimensions."""
    return Box.at((start, *[0] * (len(sizes) - 1)), sizes)


def _names(rows: str | tuple[str, ...]) -> tuple[str, ...]:
    return (rows,) if isinstance(rows, str) else rows
