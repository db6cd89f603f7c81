"""The fused loss's memory, computed from sizes, for picking its chunk and for `rlad plan`. Needs no torch."""

from __future__ import annotations

import itertools

from rlad_megatron.config import LossConfig

VOCAB_MULTIPLE = 128  # Megatron pads the vocabulary to a multiple of this times TP
# More tokens would only cost memory: by arithmetic, adding the weight's float32 gradient once for so many costs an H100
# 4% of the products' time (docs/method.md).
MOST_CHUNK_TOKENS = 8192


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Vocabulary as Megatron pads it: the next multiple of 128 * TP, split evenly over ranks."""
    multiple = VOCAB_MULTIPLE * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def pick_chunk_tokens(memory_mb: int, vocab_columns: int, itemsize: int) -> int:
    """Tokens whose logits fit into `memory_mb` (1e6 bytes); at least 1 and at most MOST_CHUNK_TOKENS.

    vocab_columns: those of this rank's shard. itemsize: bytes of a logit (4 fp32, 2 bf16).
    """
    return max(1, min(memory_mb * 10**6 // (vocab_columns * itemsize), MOST_CHUNK_TOKENS))


def loss_bytes(
    vocab_columns: int, hidden_size: int, num_tokens: int, itemsize: int, loss: LossConfig, *, gradients: bool
) -> int:
    """Peak memory of the loss over `num_tokens` tokens on a rank, without the weight's gradient.

    Counts the hidden states of these tokens and, with `gradients`, their gradient. The fused loss adds the logits of
    one chunk, which their gradient overwrites. The other path adds the logits of all tokens, their float32 softmax and,
    in half precision, the copy of it that backward makes.
    """
    hidden = (2 if gradients else 1) * num_tokens * hidden_size * itemsize
    if loss.fused:
        chunk = pick_chunk_tokens(loss.memory_mb, vocab_columns, itemsize)
        return hidden + min(num_tokens, chunk) * vocab_columns * itemsize
    copy = itemsize if gradients and itemsize < 4 else 0
    return hidden + num_tokens * vocab_columns * (itemsize + 4 + copy)


def chunks_of(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Nearly equal chunks of at most `chunk_tokens`, the longest first; one empty chunk without tokens."""
    count = max(1, -(-num_tokens // chunk_tokens))
    bounds = [-(-num_tokens * i // count) for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
