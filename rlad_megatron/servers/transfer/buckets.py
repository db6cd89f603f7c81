"""How slices of Hugging Face tensors fill buckets. Pure bookkeeping, the same on both sides of a transfer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rlad_megatron.models.box import Box
from rlad_megatron.models.gathered import TensorMetadata

ALIGNMENT = 16  # bytes; of each part in its bucket


@dataclass(frozen=True)
class Part:
    """Rows of one slice, in one bucket."""

    slice: int  # index of the slice they are cut from
    box: Box  # where they lie in the whole tensor
    start: int  # first byte in the bucket
    size: int  # bytes

    def view(self, bucket: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The part as a tensor of its shape. bucket: uint8."""
        return bucket[self.start : self.start + self.size].view(dtype).view(self.box.sizes)


Bucket = list[Part]


def bucket_size(bucket: Bucket) -> int:
    """In bytes."""
    return bucket[-1].start + bucket[-1].size


@dataclass(frozen=True)
class Cargo:
    """What one owner sends: slices of the model's tensors, in the order of the tensors."""

    tensors: list[TensorMetadata]  # of the whole model
    slices: list[tuple[int, Box]]  # (index of the tensor, where the slice lies in it)

    def buckets(self, limit: int) -> list[Bucket]:
        """Slices in buckets of at most `limit` bytes, or of one row of a tensor if that is larger."""
        found: list[Bucket] = []
        used = limit
        for index, (tensor, box) in enumerate(self.slices):
            row = math.prod(box.sizes[1:]) * self.tensors[tensor].dtype.itemsize
            start, stop = box[0]
            while start < stop:
                used = -(-used // ALIGNMENT) * ALIGNMENT
                if (rows := (limit - used) // row) < 1:
                    found.append([])
                    used, rows = 0, max(1, limit // row)
                end = min(stop, start + rows)
                found[-1].append(Part(index, Box(((start, end), *box[1:])), used, (end - start) * row))
                used += (end - start) * row
                start = end
        return found

    def to_bytes(self) -> bytes:
        """The slices; the list of tensors is the same for all owners."""
        return json.dumps(self.slices).encode()

    @classmethod
    def from_bytes(cls, data: bytes, tensors: list[TensorMetadata]) -> Cargo:
        return cls(tensors, [(tensor, Box(map(tuple, box))) for tensor, box in json.loads(data)])


def tensors_to_bytes(tensors: Sequence[TensorMetadata]) -> bytes:
    listed = [(tensor.name, str(tensor.dtype).removeprefix("torch."), tensor.shape) for tensor in tensors]
    return json.dumps(listed).encode()


def tensors_from_bytes(data: bytes) -> list[TensorMetadata]:
    return [TensorMetadata(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in json.loads(data)]


def first_difference(ours: Sequence[TensorMetadata], theirs: Sequence[TensorMetadata]) -> str:
    """The first tensor in which two lists differ, in words; empty if they are the same."""
    for index in range(max(len(ours), len(theirs))):
        one, other = (str_of(tensors[index]) if index < len(tensors) else "nothing" for tensors in (ours, theirs))
        if one != other:
            return f"{one} against {other}"
    return ""


def str_of(tensor: TensorMetadata) -> str:
    return f"{tensor.name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def merged_order(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(owner, bucket) of all owners' buckets, so that all go through their share at the same pace.

    counts: number of buckets of each owner. A tensor whose slices come from several owners is then complete early.
    """
    order = sorted(
        ((index + 0.5) / count, owner, index) for owner, count in enumerate(counts) for index in range(count)
    )
    yield from ((owner, index) for _, owner, index in order)


class Assembly:
    """Puts parts together to whole tensors."""

    def __init__(self, tensors: Sequence[TensorMetadata], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._begun: dict[int, tuple[torch.Tensor, int]] = {}  # the tensor, and how many elements it lacks

    def add(self, tensor: int, box: Box, values: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Copy a part into its tensor; returns (name, tensor) when it is whole."""
        described = self._tensors[tensor]
        if tensor not in self._begun:
            whole = torch.empty(described.shape, dtype=described.dtype, device=self._device)
            self._begun[tensor] = whole, whole.numel()
        whole, missing = self._begun[tensor]
        whole[box.slices].copy_(values)
        self._begun[tensor] = whole, missing - box.numel
        if missing > box.numel:
            return None
        del self._begun[tensor]
        return described.name, whole


def check_tiling(tensors: Sequence[TensorMetadata], cargos: Sequence[Cargo]) -> None:
    """Raise ValueError naming the first tensor that the owners' slices do not cover exactly."""
    sent = [0] * len(tensors)
    for cargo in cargos:
        for tensor, box in cargo.slices:
            sent[tensor] += box.numel
    for whole, count in zip(tensors, sent, strict=True):
        if count != math.prod(whole.shape):
            raise ValueError(f"the trainer's ranks send {count} elements of {str_of(whole)}")
