"""What GPUs can do at most, from NVIDIA's data sheets: dense products in bf16, without sparsity."""

from __future__ import annotations

import re

# A word of the device's name, as torch and nvidia-smi give it -> FLOP/s. More specific names come first.
BF16_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


def bf16_flops(device: str) -> float | None:
    """Peak FLOP/s of a GPU in bf16 by its name, for example "NVIDIA H100 80GB HBM3"; None if it is not in the table."""
    return next((rate for name, rate in BF16_FLOPS.items() if re.search(rf"\b{name}\b", device)), None)
