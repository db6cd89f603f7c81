"""What the fused loss holds in memory, from sizes alone: for picking its chunk, and for `rlad plan`. Needs no torch."""

from __future__ import annotations

import itertools

VOCAB_MULTIPLE = 128  # Megatron pads the vocabulary to a multiple of this times TP


def bytes_per_token(vocab_columns: int, itemsize: int, *, cpu: bool) -> int:
    """Bytes that each token of a chunk takes: its logits, which their gradient overwrites.

    vocab_columns: of this rank's shard. itemsize: bytes of a logit (4 fp32, 2 bf16). A CPU has no product of half
    precision factors with a float32 sum, so there a float32 copy is made.
    """
    return vocab_columns * (itemsize if itemsize == 4 or not cpu else itemsize + 4)


def pick_chunk_tokens(memory_mb: int, vocab_columns: int, itemsize: int, *, cpu: bool) -> int:
    """Tokens whose logits fit into `memory_mb` (1e6 bytes); at least 1."""
    return max(1, memory_mb * 10**6 // bytes_per_token(vocab_columns, itemsize, cpu=cpu))


def chunks_of(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Nearly equal chunks of at most `chunk_tokens`, the longest first; one empty chunk if there is no token."""
    count = max(1, -(-num_tokens // chunk_tokens))
    bounds = [-(-num_tokens * i // count) for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
