"""How the logits are cut, and how a chunk's lie in memory: tiles of blocks of columns. On a GPU it is one block.

On a CPU a product with few rows is faster block by block, since the library does not repack the whole weight for it,
and a contiguous block is read from the cache after its product. A tile is a few blocks that share the calls of the
elementwise kernels, whose dozen small operations would cost as much as their work on a single block.

Shape letters: C tokens of a chunk, T all tokens, G blocks of a tile, B columns of a block, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlad_megatron.kernels.softmax_torch import NOT_HERE
from rlad_megatron.parallel.loss_memory import VOCAB_MULTIPLE, chunks_of

# Columns of a block; blocks of a tile. As measured, though from 512 to 1024 columns little depends on it.
_CPU_BLOCK, _CPU_TILE = 768, 10


@dataclass(frozen=True)
class Tile:
    """The columns [start, start + blocks * width) of the logits: as many rows of the weight."""

    start: int
    blocks: int
    width: int

    @property
    def stop(self) -> int:
        return self.start + self.blocks * self.width

    def rows(self, matrix_VH: torch.Tensor) -> torch.Tensor:
        """The tile's rows of the weight or of its gradient, a view [G, B, H]."""
        return matrix_VH[self.start : self.stop].view(self.blocks, self.width, matrix_VH.shape[1])

    def logits(self, buffer: torch.Tensor, num_tokens: int, *, whole: bool) -> torch.Tensor:
        """The tile's place [G, C, B] in a buffer for C * V' logits; or for those of one tile, if not `whole`."""
        # GPUs multiply faster if rows start at multiples of 128 elements. The shard's padding leaves the room.
        pitch = self.width if buffer.device.type == "cpu" else -(-self.width // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        part = buffer[self.start * num_tokens if whole else 0 :][: self.blocks * num_tokens * pitch]
        return part.view(self.blocks, num_tokens, pitch)[..., : self.width]

    def places(self, local_T: torch.Tensor) -> torch.Tensor:
        """Targets, as rows of this rank's shard, to the place in each block or NOT_HERE: int64 [G, T]."""
        first_G = self.start + self.width * torch.arange(self.blocks, device=local_T.device)
        place_GT = local_T - first_G[:, None]
        return place_GT.where((place_GT >= 0) & (place_GT < self.width), NOT_HERE)


def cut(
    num_tokens: int, chunk_tokens: int, num_columns: int, device: torch.device, *, whole: bool
) -> tuple[list[slice], list[Tile]]:
    """Chunks of at most `chunk_tokens` tokens, and tiles of this rank's real columns; of both the largest first.

    If not `whole`, only the logits of one tile of a chunk are held at once. A CPU then takes as many tokens more as the
    tile has blocks less: as many logits, and the weight is read for fewer products. Ranks may then have different
    chunks.
    """
    if device.type != "cpu" or num_columns < _CPU_BLOCK:
        return chunks_of(num_tokens, chunk_tokens), [Tile(0, 1, num_columns)]
    blocks, rest = divmod(num_columns, _CPU_BLOCK)
    tile_blocks = min(_CPU_TILE, blocks)
    if not whole:
        chunk_tokens, tile_blocks = chunk_tokens * tile_blocks, 1
    tiles = [Tile(i * _CPU_BLOCK, min(tile_blocks, blocks - i), _CPU_BLOCK) for i in range(0, blocks, tile_blocks)]
    if rest:
        tiles.append(Tile(blocks * _CPU_BLOCK, 1, rest))
    return chunks_of(num_tokens, chunk_tokens), tiles
