"""The trainer's side of a weight transfer through a file system that all hosts share.

For servers on other hosts, and for a trainer on several: the file lies in the run folder. The first rank writes it,
tensor by tensor, under a temporary name and renames it. A new file for each version, because hosts of a network file
system may go on seeing old pages of a file that is rewritten in place. The workers load it as they do the file in
shared memory (`worker.py`). Every tensor is summed over all ranks on its way (`MegatronWeightSource.__iter__`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from rlad_megatron.errors import WeightSyncError
from rlad_megatron.models.gathered import MegatronWeightSource
from rlad_megatron.parallel.collective import is_first_rank, on_first_rank
from rlad_megatron.servers.client import ServerClient, for_each_server
from rlad_megatron.servers.transfer.shared_memory import NOT_READY, file_in_run_dir, load_file, safetensors_header


class _NewFile:
    """A file that gets its name when it is complete. Keeps an error until then, so that a loop over it goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_suffix(".tmp")
        self.error: OSError | None = None
        self._file: BinaryIO | None = None

    def add(self, data: bytes | memoryview) -> None:
        if self.error is not None:
            return
        try:
            if self._file is None:
                self._file = self.temporary.open("wb")
            self._file.write(data)
        except OSError as error:
            self.error = error

    def publish(self) -> None:
        """Rename, or remove what was written and raise a WeightSyncError."""
        try:
            if self._file is not None:
                with self._file:
                    if self.error is None:
                        self._file.flush()
                        os.fsync(self._file.fileno())
            if self.error is None:
                os.replace(self.temporary, self.path)
        except OSError as error:
            self.error = error
        if self.error is not None:
            self.temporary.unlink(missing_ok=True)
            raise WeightSyncError(
                f"{self.path}: the weights could not be written there ({self.error.strerror}); free some space, or "
                "choose a runs_dir that this node can write"
            ) from self.error


class SharedFileTrainerEngine:
    """Writes the file and tells servers to read it. The calls of `SharedMemoryTrainerEngine`."""

    def __init__(self, *, source: MegatronWeightSource, run_dir: Path) -> None:
        """All ranks of the source's group together."""
        self.source = source
        self.path = file_in_run_dir(run_dir)
        self.version = NOT_READY  # what the file holds

    def write(self, version: int) -> None:
        """Put the source's present weights into a new file, as `version`. All ranks together.

        Raises WeightSyncError, on every rank, when the file system refuses.
        """
        self.version = NOT_READY
        file = _NewFile(self.path) if is_first_rank(self.source.group) else None
        if file is not None:
            file.add(safetensors_header(self.source.metadata(), version))
        for _, tensor in self.source:  # a collective for each tensor: every rank stays in it to the end
            if file is not None:
                file.add(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        on_first_rank(lambda: file.publish(), self.source.group)
        self.version = version

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """As `SharedMemoryTrainerEngine.send`."""
        if version != self.version:
            self.write(version)
        on_first_rank(lambda: for_each_server(partial(load_file, self.path, version), clients), self.source.group)

    def shutdown(self) -> None:
        """Remove the file. Safe to call twice."""
        if is_first_rank(self.source.group):
            self.path.unlink(missing_ok=True)
