"""The values that fields of the configuration take by name, and how a message lists those that would do."""

from __future__ import annotations

PRECISIONS = ("bf16", "fp16", "fp32")
EXPORT_PRECISIONS = ("bf16", "fp32")
TRANSFORMER_ENGINE = "transformer_engine"
TRANSFORMER_IMPLS = ("auto", TRANSFORMER_ENGINE, "local")
FP8_RECIPES = ("none", "delayed", "tensorwise", "blockwise", "mxfp8")
FP8_FORMATS = ("hybrid", "e4m3")
AMAX_COMPUTES = ("max", "most_recent")
MOMENTS = ("fp32", "bf16")
RECOMPUTES = ("none", "selective", "full")
AGGREGATIONS = ("sequence_mean", "token_mean")
MISMATCH_CORRECTIONS = ("none", "truncated_is", "icepop")
DECAYS = ("constant", "linear", "cosine")
DTYPES = ("bfloat16", "float16", "float32")
PROMPT_STYLES = ("chat", "plain")
WEIGHT_TRANSFERS = ("auto", "shared_memory", "nccl", "ipc")


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def either(sizes: list[int]) -> str:
    """[1, 2, 4] as "1, 2 or 4"."""
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}" if others else last
