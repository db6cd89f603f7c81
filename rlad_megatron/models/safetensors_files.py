"""Write a Hugging Face folder: its safetensors files tensor by tensor, from several processes at the same time.

Names, shapes and dtypes are known before the first tensor, so the headers fix the place of every tensor. Each tensor is
then written straight to its place, in any order and by any process.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from rlad_megatron import platform
from rlad_megatron.config.dtypes import DTYPES
from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.checkpoint_files import digests_of, write_digests
from rlad_megatron.models.load import INDEX, SINGLE, copy_side_files
from rlad_megatron.models.registry import text_model

MAX_SHARD_BYTES = 5 * 10**9
_NAMES = {platform.DTYPES[dtype.name]: dtype.safetensors for dtype in DTYPES}

# Side files that only a model with a vision tower has.
_OF_PICTURES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

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


class SafetensorsFiles:
    """The files of one model. Call `create()` in one process, then `write()` for every tensor, anywhere."""

    def __init__(self, folder: Path, tensors: Tensors, max_shard_bytes: int) -> None:
        """tensors: in the order in which they fill the files."""
        self.folder, self._tensors = folder, tensors
        shards: list[dict] = [{}]
        used = self.total_bytes = 0
        for name, (shape, dtype) in tensors.items():
            size = _nbytes(shape, dtype)
            self.total_bytes += size
            if shards[-1] and used + size > max_shard_bytes:
                shards.append({})
                used = 0
            shards[-1][name] = (shape, dtype)
            used += size
        self._headers: dict[str, tuple[bytes, int]] = {}  # by file: the header, and the file's size
        self._places: dict[str, tuple[str, int]] = {}  # by tensor: the file, and the offset of its first byte
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            # Wide dtypes first, so that every tensor is aligned.
            ordered = dict(sorted(shard.items(), key=lambda item: -item[1][1].itemsize))
            header, bounds = safetensors_header(ordered, metadata={"format": "pt"}, alignment=8)
            self._headers[file] = (header, bounds[-1])
            self._places |= {name: (file, start) for name, start in zip(ordered, bounds, strict=False)}

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self._headers)

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
            weight_map = {name: file for name, (file, _) in self._places.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor to its place, converted to the dtype given for it.

        Raises:
            CheckpointError: the file system refuses.
        """
        shape, dtype = self._tensors[name]
        file, offset = self._places[name]
        assert tuple(tensor.shape) == tuple(shape), (name, tensor.shape, shape)
        data = tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy()
        try:
            with open(self.folder / file, "r+b") as stream:
                stream.seek(offset)
                stream.write(data)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / file}: cannot write tensor {name!r} ({error.strerror}); "
                "free some space or choose another folder"
            ) from error


def export_hf(
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    like: str | Path,
    target: Path,
    dtype: torch.dtype,
    float32: Collection[str] = (),
    write: bool,
) -> None:
    """Write `tensors`, of these shapes, in `dtype` as safetensors, with the config and tokenizer files of `like`.

    Those in `float32` are written in that dtype. Of a model with a vision tower, only the text model is written.

    Iterating may be collective, so every rank calls this, one of them with `write=True`. The folder gets its name when
    it is complete, and replaces an earlier one.
    """
    if not write:
        for _ in tensors:
            pass
        return
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtypes = {name: torch.float32 if name in float32 else dtype for name in shapes}
    files = SafetensorsFiles(
        temporary, {name: (shape, dtypes[name]) for name, shape in shapes.items()}, MAX_SHARD_BYTES
    )
    files.create()
    missing = set(shapes)
    for name, tensor in tensors:
        files.write(name, tensor)
        missing.remove(name)
    assert not missing, missing
    write_digests(temporary, digests_of(temporary, [file.name for file in temporary.iterdir()]))
    copy_side_files(like, temporary)
    write_text_config(temporary / "config.json", dtype)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def write_text_config(config_file: Path, dtype: torch.dtype | None) -> None:
    """Make a config.json that of the text model, and name the stored dtype in it, if all tensors have one."""
    config = json.loads(config_file.read_text())
    text = text_model(config)
    config_file.write_text(json.dumps(text, indent=2) + "\n")
    for name in _OF_PICTURES if text is not config else ():
        config_file.with_name(name).unlink(missing_ok=True)
    if dtype is not None:
        set_dtype(config_file, dtype)


def set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Name the stored dtype in a config.json."""
    config = json.loads(config_file.read_text())
    config.pop("torch_dtype", None)  # the older name of the same field
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
