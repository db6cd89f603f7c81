"""The tensors of Megatron-Core's distributed checkpoints (`torch_dist`): their names, and what each is made of.

They are those of the shard plan at tensor-parallel size 1; of some parameters each part is a tensor (models/rules.py).
Parameters of the layers are stacked under one key, with the layer (and the expert) as leading axes; where layers are of
several types, each layer has its own keys. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from rlad_megatron.models.box import Box
from rlad_megatron.models.registry import family_for
from rlad_megatron.models.rules import Piece, Rule
from rlad_megatron.models.shard_plan import layer_of, stage_rows
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.loss_memory import padded_vocab_size

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")  # everything else is optimizer, rng, ...


@dataclass(frozen=True)
class Block:
    """One uncut Megatron parameter of one layer (and one expert), or a part of it, as a checkpoint stores it."""

    key: str  # in the checkpoint
    place: tuple[int, ...]  # (), (layer,) or (layer, expert)
    index: tuple[int, ...]  # position on the leading axes: `place`, or without the layer, which is in the key
    counts: tuple[int, ...]  # sizes of the leading axes
    shape: tuple[int, ...]  # without the leading axes; the vocabulary unpadded
    pieces: tuple[Piece, ...]
    rule: Rule  # of the parameter
    own_key: str  # in checkpoints of our trainer, whose layers have the names of the tables
    part: int | None = None  # number of the part, if checkpoints store the parts one by one

    @property
    def offset(self) -> float:
        """What is added to the values when they are stored under `key`."""
        return -1.0 if self.rule.zero_centered else 0.0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def stored_shape(self, tp: int) -> tuple[int, ...]:
        """Shape in a checkpoint written for this tensor-parallel size: the vocabulary is padded."""
        rows, *rest = self.shape
        return (padded_vocab_size(rows, tp) if self.rule.cut == "vocabulary" else rows, *rest)

    @property
    def module(self) -> str:
        """The key of the module that the parameter belongs to."""
        parameter = self.key if self.part is None else self.key.rpartition(".")[0]
        return parameter.rpartition(".")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors that it is made of, or is a part of."""
        return self._rule.hf

    def cuts(self, spec: ModelSpec, tp: int, tp_rank: int) -> tuple[Box, ...]:
        """The parts of it that a tensor-parallel rank holds."""
        return self._rule.cuts(spec, tp, tp_rank)

    @property
    def _rule(self) -> Rule:
        return self.rule if self.part is None else self.rule.part(self.part)


def model_blocks(spec: ModelSpec) -> list[Block]:
    """Every parameter of the model, in layer order. A tied head appears once, as the embedding."""
    stacked = len(family_for(spec).layers) == 1
    blocks: list[Block] = []
    for row in stage_rows(spec):
        renamed = layer_of(spec, row.index[0]).checkpoint_names if row.index else ()
        key, index = _stacked_key(row.template, renamed), row.index
        own_key = key
        if row.rule.zero_centered:
            key = f"{key.rpartition('.')[0]}.{row.rule.zero_centered}"
        counts = (spec.num_layers, spec.num_experts)[: len(index)]
        if index and not stacked:
            key, own_key = (key_of_layer(name, index[0]) for name in (key, own_key))
            index, counts = index[1:], counts[1:]
        block = Block(key, row.index, index, counts, *row.rule.uncut(spec), row.rule, own_key)
        blocks += _parts(block) if row.rule.stored else [block]
    return blocks


def _parts(block: Block) -> Iterator[Block]:
    """A parameter's parts, each of which is one piece of a Hugging Face tensor."""
    for part, (ending, piece) in enumerate(zip(block.rule.stored, block.pieces, strict=True)):
        shape = piece.hf_slices.sizes
        moved = replace(piece, local_slices=Box.whole(shape))
        yield replace(block, key=f"{block.key}.{ending}", shape=shape, pieces=(moved,), part=part)


def key_of_layer(key: str, layer: int) -> str:
    """decoder.layers.x -> decoder.layers.{layer}.x"""
    return key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)


def _stacked_key(name: str, renamed: Iterable[tuple[str, str]]) -> str:
    """decoder.layers.{layer}.mlp.experts.local_experts.{expert}.x -> decoder.layers.mlp.experts.experts.x"""
    for old, new in renamed:
        name = name.replace(f"{{layer}}.{old}", f"{{layer}}.{new}")
    return name.replace("{layer}.", "").replace("local_experts.{expert}.", "experts.")
