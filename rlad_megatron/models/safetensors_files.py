"""Write the safetensors files of a Hugging Face folder tensor by tensor, from several processes at once.

Names, shapes and dtypes are known before the first tensor, so the headers and the places of all tensors are fixed
first; then each tensor is written straight to its place, in any order and by any process.
Format: 8 bytes with the header's length, the header as JSON, the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.load import FLOATS, INDEX, SINGLE

MAX_SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int  # of the tensor's first byte
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsFiles:
    """The files of one model. Call `create()` in one process, then `write()` for every tensor, anywhere."""

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """`tensors`: shape and dtype by name, in the order in which they fill the files."""
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

    def _lay_out(self, file: str, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends = [0]
        # Wide dtypes first, so that every tensor is aligned.
        ordered = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
        for name, (shape, dtype) in ordered:
            ends.append(ends[-1] + _nbytes(shape, dtype))
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": ends[-2:]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        encoded = len(encoded).to_bytes(8, "little") + encoded
        self._headers[file] = (encoded, len(encoded) + ends[-1])
        for (name, (shape, dtype)), start in zip(ordered, ends, strict=False):
            self._places[name] = _Place(file, len(encoded) + start, tuple(shape), dtype)

    def create(self) -> None:
        """Write the headers, reserve the space, and write the index where there are several files.

        Raises:
            CheckpointError: there is not enough space.
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
        """Put a tensor in its place, converted to its dtype.

        Raises:
            CheckpointError: the file system refuses; names file and tensor.
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
