"""How Megatron cuts a Hugging Face tensor over tensor-parallel ranks: four rules, all pure bookkeeping.

Each rule says, for a rank, the shape of its parameter and the pieces it is made of (`pieces`), and which part of
the uncut parameter that is (`cuts`): checkpoints store uncut parameters. Sizes are named ("hidden", "ffn", ...) so
that a family's table holds for every model of the family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from rlad_megatron.parallel.loss_memory import padded_vocab_size

Slices = tuple[tuple[int, int], ...]  # (start, stop) in each dimension


@dataclass(frozen=True)
class Piece:
    """One rectangular part of a Megatron parameter and the part of a Hugging Face tensor that equals it."""

    hf_name: str
    hf_slices: Slices  # where in the Hugging Face tensor
    local_slices: Slices  # where in this rank's parameter


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder. `num_experts` is 0 for a dense one."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    num_experts: int = 0
    expert_ffn_size: int = 0

    def size(self, name: str) -> int:
        return {
            "hidden": self.hidden_size,
            "ffn": self.ffn_size,
            "query": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "head_dim": self.head_dim,
            "vocab": self.vocab_size,
            "experts": self.num_experts,
            "expert_ffn": self.expert_ffn_size,
        }[name]


def model_shape(hf_config) -> ModelShape:
    """Read the sizes from a transformers configuration."""
    heads = hf_config.num_attention_heads
    return ModelShape(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_size=hf_config.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        vocab_size=hf_config.vocab_size,
        tied=bool(hf_config.tie_word_embeddings),
        num_experts=getattr(hf_config, "num_experts", None) or 0,
        expert_ffn_size=getattr(hf_config, "moe_intermediate_size", None) or 0,
    )


class Rule(Protocol):
    """How one Megatron parameter is made of Hugging Face tensors."""

    replicated: bool  # every tensor-parallel rank holds the same

    def at(self, layer: int, expert: int) -> Rule:
        """The rule with the layer and the expert filled into its Hugging Face names."""

    def hf_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]: ...

    def pieces(self, shape: ModelShape, tp: int, tp_rank: int) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
        """(shape of the rank's parameter, what it is made of)."""

    def cuts(self, shape: ModelShape, tp: int, tp_rank: int) -> tuple[Slices, ...]:
        """The rectangles of the uncut parameter that the rank writes; none where an earlier rank holds the same."""


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every rank (norms)."""

    hf: str
    sizes: tuple[str, ...]
    replicated = True

    def at(self, layer: int, expert: int) -> Replicated:
        return replace(self, hf=self.hf.format(layer=layer, expert=expert))

    def hf_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        return {self.hf: tuple(shape.size(name) for name in self.sizes)}

    def pieces(self, shape: ModelShape, tp: int, tp_rank: int):
        (full,) = self.hf_shapes(shape).values()
        everything = tuple((0, size) for size in full)
        return full, (Piece(self.hf, everything, everything),)

    def cuts(self, shape: ModelShape, tp: int, tp_rank: int):
        (full,) = self.hf_shapes(shape).values()
        return (tuple((0, size) for size in full),) if tp_rank == 0 else ()


@dataclass(frozen=True)
class RowParallel:
    """A matrix cut along its input dimension (attention output, feed-forward output)."""

    hf: str
    rows: str
    columns: str
    replicated = False

    def at(self, layer: int, expert: int) -> RowParallel:
        return replace(self, hf=self.hf.format(layer=layer, expert=expert))

    def hf_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        return {self.hf: (shape.size(self.rows), shape.size(self.columns))}

    def pieces(self, shape: ModelShape, tp: int, tp_rank: int):
        rows, width = shape.size(self.rows), shape.size(self.columns) // tp
        piece = Piece(self.hf, ((0, rows), (tp_rank * width, (tp_rank + 1) * width)), ((0, rows), (0, width)))
        return (rows, width), (piece,)

    def cuts(self, shape: ModelShape, tp: int, tp_rank: int):
        rows, width = shape.size(self.rows), shape.size(self.columns) // tp
        return (((0, rows), (tp_rank * width, (tp_rank + 1) * width)),)


@dataclass(frozen=True)
class ColumnParallel:
    """Tensors cut along their output dimension and interleaved in units.

    A rank holds a run of units; each unit is one block of every tensor, in order. With units
    "kv_heads" this is Megatron's QKV layout (per query group: its query heads, its key, its value);
    with units "ranks" it is gate-and-up (the rank's gate rows, then its up rows).
    """

    hf: tuple[str, ...]
    rows: tuple[str, ...]
    units: str  # "kv_heads" | "ranks"
    columns: str | None = "hidden"  # None: biases
    replicated = False

    def at(self, layer: int, expert: int) -> ColumnParallel:
        return replace(self, hf=tuple(name.format(layer=layer, expert=expert) for name in self.hf))

    def _trailing(self, shape: ModelShape) -> tuple[int, ...]:
        return () if self.columns is None else (shape.size(self.columns),)

    def hf_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        trailing = self._trailing(shape)
        return {name: (shape.size(rows), *trailing) for name, rows in zip(self.hf, self.rows, strict=True)}

    def pieces(self, shape: ModelShape, tp: int, tp_rank: int):
        units = shape.num_kv_heads if self.units == "kv_heads" else tp
        trailing = self._trailing(shape)
        rest = tuple((0, size) for size in trailing)
        blocks = [shape.size(rows) // units for rows in self.rows]
        per_rank = units // tp
        pieces, at = [], 0
        for unit in range(tp_rank * per_rank, (tp_rank + 1) * per_rank):
            for name, block in zip(self.hf, blocks, strict=True):
                pieces.append(Piece(name, ((unit * block, (unit + 1) * block), *rest), ((at, at + block), *rest)))
                at += block
        return (at, *trailing), tuple(pieces)

    def cuts(self, shape: ModelShape, tp: int, tp_rank: int):
        rest = tuple((0, size) for size in self._trailing(shape))
        sizes = [shape.size(rows) for rows in self.rows]
        if self.units == "kv_heads":
            width = sum(sizes) // tp  # whole units, or an even part of one where TP exceeds the key-value heads
            return (((tp_rank * width, (tp_rank + 1) * width), *rest),)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        widths = [size // tp for size in sizes]
        return tuple(
            ((start + tp_rank * width, start + (tp_rank + 1) * width), *rest)
            for start, width in zip(starts, widths, strict=True)
        )


@dataclass(frozen=True)
class VocabParallel:
    """Embedding or head: rows cut over the padded vocabulary; the padding is in no Hugging Face tensor."""

    hf: str
    replicated = False

    def at(self, layer: int, expert: int) -> VocabParallel:
        return self

    def hf_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        return {self.hf: (shape.vocab_size, shape.hidden_size)}

    def pieces(self, shape: ModelShape, tp: int, tp_rank: int):
        local = padded_vocab_size(shape.vocab_size, tp) // tp
        start = tp_rank * local
        rows = min(start + local, shape.vocab_size) - start
        columns = (0, shape.hidden_size)
        pieces = (Piece(self.hf, ((start, start + rows), columns), ((0, rows), columns)),) if rows > 0 else ()
        return (local, shape.hidden_size), pieces

    def cuts(self, shape: ModelShape, tp: int, tp_rank: int):
        local = padded_vocab_size(shape.vocab_size, tp) // tp
        return (((tp_rank * local, (tp_rank + 1) * local), (0, shape.hidden_size)),)
