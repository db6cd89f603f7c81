"""Compare two checkpoints, in either format, tensor by tensor and independently of the conversion.

The conversion copies the pieces of the shard plan. This code takes a Megatron parameter apart by reshaping it as a
whole, so it shows mistakes in the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from rlad_megatron.convert.megatron_files import check_finite
from rlad_megatron.models.box import Box
from rlad_megatron.models.load import Checkpoint
from rlad_megatron.models.megatron_tensors import Block, model_blocks
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.models.torch_dist import MegatronCheckpoint


def sample_blocks(spec: ModelSpec) -> list[Block]:
    """One block of every kind of parameter, at different layers and experts."""
    by_key: dict[str, list[Block]] = {}
    for block in model_blocks(spec):
        kind = block.key.replace(f".layers.{block.place[0]}.", ".layers.") if block.place else block.key
        by_key.setdefault(kind, []).append(block)
    return [blocks[(7 * number + 3) % len(blocks)] for number, blocks in enumerate(by_key.values())]


def compare(
    first: Checkpoint, second: Checkpoint, spec: ModelSpec, blocks: Iterable[Block], on_bytes: Callable[[int], None]
) -> list[str]:
    """The tensors of `blocks` that differ, in words. Both checkpoints have passed their `check`.

    Tensors of different dtypes count as the same if rounding one gives the other.

    Raises:
        CheckpointError: a tensor cannot be read, or is not finite.
    """
    differences = []
    for block in blocks:
        ours, theirs = (_tensors(checkpoint, block, spec) for checkpoint in (first, second))
        for name, one in ours.items():
            other = theirs[name]
            check_finite(one, name, first)
            check_finite(other, name, second)
            if not (_same(one, other) or _same(other, one)):
                largest = (one.float() - other.float()).abs().max().item()
                dtypes = f"{one.dtype}, {other.dtype}".replace("torch.", "")
                differences.append(f"{name}: largest difference {largest:.3g} ({dtypes})")
            on_bytes(one.nbytes)
        del ours, theirs, one, other  # before the next ones are read
        first.release()
        second.release()
    return differences


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit, after rounding `one` to the other's dtype."""
    if one.dtype.itemsize < other.dtype.itemsize:
        return False
    one = one.to(other.dtype).contiguous()
    return torch.equal(one.flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def _tensors(checkpoint: Checkpoint, block: Block, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors that a block is made of, whole, or the part of one that it is."""
    if isinstance(checkpoint, MegatronCheckpoint):
        return take_apart(block, checkpoint.read_block(block), spec)
    shapes = block.rule.hf_shapes(spec)
    whole = {name: checkpoint.read(name, Box.whole(shapes[name])) for name in block.names}
    if block.part is None:
        return whole
    (name,) = block.names
    parts = [tensor for tensor, sizes in block.rule.part_sizes(spec) for _ in sizes]
    sizes = dict(block.rule.part_sizes(spec))[name]
    return {_label(block): whole[name].split(sizes)[block.part - parts.index(name)]}


def _label(block: Block) -> str:
    return f"{block.names[0]} ({block.key.rpartition('.')[2]})"


def take_apart(block: Block, tensor: torch.Tensor, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """An uncut Megatron parameter as Hugging Face tensors. [...] is the input dimension, absent for biases.

    QKV is [key-value heads, query heads per key-value head + 2, head_dim, ...], with a gate as many heads again after
    the queries, which Hugging Face has head by head; gate and up are stacked.
    """
    rule = block.rule
    if block.part is not None:
        return {_label(block): tensor}
    if rule.cut != "kv_heads":
        return dict(zip(rule.hf, tensor.chunk(len(rule.hf)), strict=True))
    queries, gates = spec.num_heads // spec.num_kv_heads, len(rule.part_sizes(spec)[0][1])
    groups = tensor.view(spec.num_kv_heads, queries * gates + 2, spec.head_dim, *tensor.shape[1:])
    query, key, value = groups.split([queries * gates, 1, 1], dim=1)
    if gates > 1:
        query = torch.stack(query.chunk(gates, dim=1), dim=2)
    return {name: part.reshape(-1, *tensor.shape[1:]) for name, part in zip(rule.hf, (query, key, value), strict=True)}
