"""The trainer's side of a weight transfer through a file system that all hosts share.

For servers on other hosts, and for a trainer on several. The first rank writes the file into the run folder, tensor by
tensor, under a temporary name and renames it. Each version is a new file: hosts of a network file system may keep
seeing old pages of one that is rewritten in place. Workers load it like the file in shared memory (`worker.py`). Every
tensor is summed over all ranks on its way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from rlad_megatron.errors import WeightSyncError
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.parallel.collective import is_first_rank, on_first_rank
from rlad_megatron.servers.client import ServerClient, for_each_server
from rlad_megatron.servers.transfer.shared_memory import NOT_READY, header_and_bounds, load_file
from rlad_megatron.servers.transfer.weights_file import TEMPORARY, possible_files


class SharedFileTransfer:
    """Writes the file and tells servers to read it."""

    def __init__(self, weights: GatheredWeights, run_dir: Path) -> None:
        self.weights = weights
        _, self.path = possible_files(run_dir)
        self.version = NOT_READY  # what the file holds

    def write(self, version: int) -> None:
        """Put the present weights into a new file, as `version`. Collective.

        Raises WeightSyncError, on every rank, when the file system refuses.
        """
        self.version = NOT_READY
        chunks = self._chunks(version)
        error: OSError | None = None
        if is_first_rank(self.weights.group):
            temporary = self.path.with_suffix(TEMPORARY)
            try:
                with temporary.open("wb") as file:
                    file.writelines(chunks)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            except OSError as caught:
                temporary.unlink(missing_ok=True)
                error = caught
        for _ in chunks:  # a collective for each tensor, so every rank goes on to the end
            pass

        def check() -> None:
            if error is not None:
                raise WeightSyncError(
                    f"{self.path}: the weights could not be written there ({error.strerror}); free some space, or "
                    "choose a runs_dir that this node can write"
                ) from error

        on_first_rank(check, self.weights.group)
        self.version = version

    def send(self, version: int, clients: Sequence[ServerClient]) -> None:
        """As `SharedMemoryTransfer.send`."""
        if version != self.version:
            self.write(version)
        on_first_rank(lambda: for_each_server(partial(load_file, self.path, version), clients), self.weights.group)

    def _chunks(self, version: int) -> Iterator[bytes | memoryview]:
        """The file's content: header, then the tensors."""
        yield header_and_bounds(self.weights.metadata(), version)[0]
        for _, tensor in self.weights:
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
