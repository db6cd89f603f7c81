"""How Megatron cuts a Hugging Face tensor over tensor-parallel ranks: four rules, all pure bookkeeping.

For each rank, a rule gives the shape of the rank's parameter and the pieces it is made of (`pieces`), and which part of
the uncut parameter that is (`cuts`): checkpoints store uncut parameters. Sizes have names ("hidden", "ffn", ...), so
that a family's table holds for every model of the family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

from rlad_megatron.models.box import Box
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.loss_memory import padded_vocab_size


@dataclass(frozen=True)
class Piece:
    """One rectangular part of a Megatron parameter and the part of a Hugging Face tensor that equals it."""

    hf_name: str
    hf_slices: Box  # in the Hugging Face tensor
    local_slices: Box  # in this rank's parameter


class Rule(Protocol):
    """How one Megatron parameter is made of Hugging Face tensors."""

    replicated: bool  # the same on every tensor-parallel rank

    def at(self, layer: int, expert: int) -> Rule:
        """The rule with the layer and the expert filled into its Hugging Face names."""

    def hf_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]: ...

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
        """(shape of the rank's parameter, what it is made of)"""

    def cuts(self, spec: ModelSpec, tp: int, tp_rank: int) -> tuple[Box, ...]:
        """The parts of the uncut parameter that the rank writes; none where an earlier rank holds the same."""


@dataclass(frozen=True)
class OneTensor:
    """A parameter that is a part of one Hugging Face tensor, and possibly of padding behind it."""

    hf: str
    sizes: tuple[str, ...]  # names of the tensor's sizes
    replicated = False

    def at(self, layer: int, expert: int) -> Self:
        return replace(self, hf=self.hf.format(layer=layer, expert=expert))

    def shape(self, spec: ModelSpec) -> tuple[int, ...]:
        return tuple(spec.size(name) for name in self.sizes)

    def hf_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        return {self.hf: self.shape(spec)}

    def part(self, spec: ModelSpec, tp: int, tp_rank: int) -> Box:
        """Where the rank's parameter lies in the tensor and its padding."""
        raise NotImplementedError

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
        part = self.part(spec, tp, tp_rank)
        real = part.intersect(Box.whole(self.shape(spec)))
        return part.sizes, (Piece(self.hf, real, Box.whole(real.sizes)),) if real else ()

    def cuts(self, spec: ModelSpec, tp: int, tp_rank: int) -> tuple[Box, ...]:
        return (self.part(spec, tp, tp_rank),) if tp_rank == 0 or not self.replicated else ()


class Replicated(OneTensor):
    """The same tensor on every rank (norms)."""

    replicated = True

    def part(self, spec: ModelSpec, tp: int, tp_rank: int) -> Box:
        return Box.whole(self.shape(spec))


class RowParallel(OneTensor):
    """A matrix cut along its input dimension (attention output, feed-forward output)."""

    def part(self, spec: ModelSpec, tp: int, tp_rank: int) -> Box:
        rows, columns = self.shape(spec)
        return Box.at((0, tp_rank * (columns // tp)), (rows, columns // tp))


class VocabParallel(OneTensor):
    """Embedding or head: rows cut over the padded vocabulary; the padding is in no Hugging Face tensor."""

    def part(self, spec: ModelSpec, tp: int, tp_rank: int) -> Box:
        rows, columns = self.shape(spec)
        return _rows(tp_rank * (padded_vocab_size(rows, tp) // tp), (padded_vocab_size(rows, tp) // tp, columns))


@dataclass(frozen=True)
class ColumnParallel:
    """Tensors cut along their output dimension and interleaved in units.

    A rank holds a run of units. A unit is one block of every tensor, in order. With units "kv_heads" this is Megatron's
    QKV layout (per query group: its query heads, its key, its value); with units "ranks" it is gate-and-up (the rank's
    gate rows, then its up rows).
    """

    hf: tuple[str, ...]
    rows: tuple[str, ...]
    units: str  # "kv_heads" | "ranks"
    columns: str | None = "hidden"  # None for biases
    replicated = False

    def at(self, layer: int, expert: int) -> ColumnParallel:
        return replace(self, hf=tuple(name.format(layer=layer, expert=expert) for name in self.hf))

    def _trailing(self, spec: ModelSpec) -> tuple[int, ...]:
        return () if self.columns is None else (spec.size(self.columns),)

    def hf_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        trailing = self._trailing(spec)
        return {name: (spec.size(rows), *trailing) for name, rows in zip(self.hf, self.rows, strict=True)}

    def pieces(self, spec: ModelSpec, tp: int, tp_rank: int):
        units = spec.num_kv_heads if self.units == "kv_heads" else tp
        rest = self._trailing(spec)
        blocks = [spec.size(rows) // units for rows in self.rows]
        per_rank = units // tp
        pieces, at = [], 0
        for unit in range(tp_rank * per_rank, (tp_rank + 1) * per_rank):
            for name, block in zip(self.hf, blocks, strict=True):
                sizes = (block, *rest)
                pieces.append(Piece(name, _rows(unit * block, sizes), _rows(at, sizes)))
                at += block
        return (at, *rest), tuple(pieces)

    def cuts(self, spec: ModelSpec, tp: int, tp_rank: int):
        rest = self._trailing(spec)
        sizes = [spec.size(rows) for rows in self.rows]
        if self.units == "kv_heads":
            width = sum(sizes) // tp  # whole units, or an even part of one where TP exceeds the key-value heads
            return (_rows(tp_rank * width, (width, *rest)),)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        widths = [size // tp for size in sizes]
        return tuple(
            _rows(start + tp_rank * width, (width, *rest)) for start, width in zip(starts, widths, strict=True)
        )


def _rows(start: int, sizes: tuple[int, ...]) -> Box:
    """Rows from `start` on, whole in the other dimensions."""
    return Box.at((start, *[0] * (len(sizes) - 1)), sizes)
