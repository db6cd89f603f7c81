"""Write the safetensors files of a Hugging Face folder tensor by tensor, from several processes at the same time.

Names, shapes and dtypes are known before the first tensor, so the headers fix the place of every tensor. Each tensor is
then written straight to its place, in any order and by any process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rlad_megatron import platform
from rlad_megatron.config.dtypes import DTYPES
from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.load import INDEX, SINGLE

MAX_SHARD_BYTES = 5 * 10**9
_NAMES = {platform.DTYPES[dtype.name]: dtype.safetensors for dtype in DTYPES}

Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name


def safetensors_header(tensors: Tensors, *, metadata: Mapping[str, str], alignment: int) -> tuple[bytes, list[int]]:
    """The start of a safetensors file with these tensors, and where each of them starts in the file, then its end.

    Format: 8 bytes with the JSON's length (little-endian), the JSON padded with spaces, the tensors' bytes.
    alignment: of the first tensor, in bytes.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    bounds = [0]
    for name, (shape, dtype) in tensors.items():
        bounds.append(bounds[-1] + _nbytes(shape, dtype))
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": bounds[-2:]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    encoded = len(text).to_bytes(8, "little") + text
    return encoded, [len(encoded) + bound for bound in bounds]


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int  # of the tensor's first byte
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsFiles:
    """The files of one model. Call `create()` in one process, then `write()` for every tensor, anywhere."""

    def __init__(self, folder: Path, tensors: Tensors, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """tensors: in the order in which they fill the files."""
        self.folder = folder
        shards: list[list[str]] = [[]]
        used = 0
        for name, (shape, dtype) in tensors.items():
            size = _nbytes(shape, dtype)
            if shards[-1] and used + size > max_shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(name)
            used += size
        self.total_bytes = sum(_nbytes(*spec) for spec in tensors.values())
        self._headers: dict[str, tuple[bytes, int]] = {}
        self._places: dict[str, _Place] = {}
        for number, names in enumerate(shards):
            file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(file, {name: tensors[name] for name in names})

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self._headers)

    def _lay_out(self, file: str, tensors: Tensors) -> None:
        # Wide dtypes first, so that every tensor is aligned.
        ordered = dict(sorted(tensors.items(), key=lambda item: -item[1][1].itemsize))
        header, bounds = safetensors_header(ordered, metadata={"format": "pt"}, alignment=8)
        self._headers[file] = (header, bounds[-1])
        for (name, (shape, dtype)), start in zip(ordered.items(), bounds, strict=False):
            self._places[name] = _Place(file, start, tuple(shape), dtype)

    def create(self) -> None:
        """Write the headers, reserve the space, and write the index if there are several files.

        Raises:
            CheckpointError: not enough space.
        """
        for file, (header, size) in self._headers.items():
            try:
                with open(self.folder / file, "wb") as stream:
                    os.posix_fallocate(stream.fileno(), 0, size)
                    stream.write(header)
            except OSError as error:
                raise CheckpointError(
                    f"{self.folder / file}: cannot reserve {size} bytes ({error.strerror}); "
                    "free some space or choose another folder"
                ) from error
        if len(self._headers) > 1:
            weight_map = {name: place.file for name, place in self._places.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor to its place, converted to the dtype given for it.

        Raises:
            CheckpointError: the file system refuses.
        """
        place = self._places[name]
        assert tuple(tensor.shape) == place.shape, (name, tuple(tensor.shape), place.shape)
        data = tensor.detach().to("cpu", place.dtype).contiguous().flatten().view(torch.uint8).numpy()
        try:
            with open(self.folder / place.file, "r+b", buffering=0) as stream:
                stream.seek(place.offset)
                left = memoryview(data)
                while left:
                    left = left[stream.write(left) :]
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / place.file}: cannot write tensor {name!r} ({error.strerror}); "
                "free some space or choose another folder"
            ) from error


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
