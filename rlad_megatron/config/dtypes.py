"""The float types of weights and each of their names. Torch-free: `platform.DTYPES` has torch's own."""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """One float type."""

    short: str  # in the configuration
    name: str  # torch's, vLLM's and transformers'
    safetensors: str
    itemsize: int  # bytes

    @property
    def names(self) -> tuple[str, str, str]:
        return self.short, self.name, self.safetensors


DTYPES = (
    Dtype("bf16", "bfloat16", "BF16", 2),
    Dtype("fp16", "float16", "F16", 2),
    Dtype("fp32", "float32", "F32", 4),
)
ITEMSIZE = {name: dtype.itemsize for dtype in DTYPES for name in dtype.names}  # by any of its names
