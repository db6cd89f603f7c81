"""What GPUs can do at most, from NVIDIA's data sheets: dense bf16 products, without sparsity; bytes in one direction.

Links: NVLink's figures there count both directions, so here is half; the L40S has none, here is PCIe 4.0 x16. Network:
one adapter for each GPU, of 400 Gb/s as in DGX H100 and B200, 200 Gb/s as in DGX A100.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Device(NamedTuple):
    """Peaks of one GPU."""

    bf16_flops: float  # FLOP/s
    memory: float  # bytes/s
    nvlink: float  # bytes/s to the other GPUs of its node
    network: float  # bytes/s to other nodes


# A word of the device's name, as torch and nvidia-smi give it. More specific names come first.
DEVICES = {
    "GB200": Device(2.5e15, 8e12, 900e9, 50e9),
    "B200": Device(2.25e15, 8e12, 900e9, 50e9),
    "GH200": Device(989e12, 4.0e12, 450e9, 50e9),
    "H200 NVL": Device(835e12, 4.8e12, 450e9, 50e9),
    "H200": Device(989e12, 4.8e12, 450e9, 50e9),
    "H100 NVL": Device(835e12, 3.9e12, 300e9, 50e9),
    "H100 PCIe": Device(756e12, 2.0e12, 300e9, 50e9),
    "H100": Device(989e12, 3.35e12, 450e9, 50e9),
    "H800": Device(989e12, 3.35e12, 200e9, 50e9),
    "A100": Device(312e12, 2.0e12, 300e9, 25e9),
    "A800": Device(312e12, 2.0e12, 200e9, 25e9),
    "L40S": Device(362e12, 0.864e12, 32e9, 25e9),
}


def find_device(name: str) -> Device | None:
    """The GPU of this name, for example "NVIDIA H100 80GB HBM3"; None if it is not in the table."""
    return next((device for word, device in DEVICES.items() if re.search(rf"\b{word}\b", name)), None)


def bf16_flops(name: str) -> float | None:
    """Peak FLOP/s of a GPU in bf16 by its name; None if it is not in the table."""
    return device.bf16_flops if (device := find_device(name)) else None


def assumed_name(memory_gb: float) -> str:
    """The GPU that a plan assumes for `train.gpu_memory_gb`, where no measurement names one."""
    return "H100" if memory_gb <= 80 else "H200" if memory_gb <= 141 else "B200"
