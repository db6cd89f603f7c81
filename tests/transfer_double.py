"""The collective transfer without its network: what owners pack, put together as a worker does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.servers.transfer.buckets import Assembly, merged_order
from rlad_megatron.servers.transfer.collective import CollectiveTransfer


def packed_and_assembled(owners: Sequence[GatheredWeights], bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor), in the order in which a worker gets them. owners: each for one process."""
    transfers = [CollectiveTransfer(weights, bucket_bytes) for weights in owners]
    assembly = Assembly(owners[0].metadata(), torch.device("cpu"))
    for owner, index in merged_order([len(transfer._buckets) for transfer in transfers]):
        transfer = transfers[owner]
        transfer._allocate()
        transfer._pack(index)
        for part in transfer._buckets[index]:
            tensor, _ = transfer._cargo.slices[part.slice]
            values = part.view(transfer._buffers[index % 2], transfer._cargo.tensors[tensor].dtype)
            if whole := assembly.add(tensor, part.box, values):
                yield whole
