"""Softmax statistics of rows whose columns are sharded over the tensor-parallel group.

The four statistics of a row are those of kernels/softmax_torch.py. Shape letters: C tokens, R ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from rlad_megatron.parallel.linear_head import LinearHead


def over_ranks(stats_4C: torch.Tensor, head: LinearHead) -> torch.Tensor:
    """The statistics over all ranks' columns, float32 [4, C], the same on each: the one collective of a chunk."""
    if head.ranks == 1 or stats_4C.numel() == 0:
        return stats_4C
    stats_R4C = stats_4C.new_empty(head.ranks, *stats_4C.shape)
    dist.all_gather(list(stats_R4C.unbind()), stats_4C.contiguous(), group=head.group)
    maximum_RC, sum_RC, target_RC, weighted_RC = stats_R4C.unbind(dim=1)
    maximum_C = maximum_RC.amax(dim=0)
    shift_RC = (maximum_RC - maximum_C) / head.temperature
    factor_RC = shift_RC.exp()
    # A rank with only padding has shift -inf and sum 0, whose product is NaN.
    moved_RC = torch.where(sum_RC > 0, shift_RC * sum_RC, 0.0)
    return torch.stack(
        [
            maximum_C,
            (factor_RC * sum_RC).sum(dim=0),
            target_RC.amax(dim=0),
            (factor_RC * (weighted_RC + moved_RC)).sum(dim=0),
        ]
    )


def log_probs(stats_4C: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs of the targets: float32 [C]."""
    # Subtract before dividing: differences of close logits are exact in float32.
    return (stats_4C[2] - stats_4C[0]) / temperature - stats_4C[1].log()


def entropy(stats_4C: torch.Tensor) -> torch.Tensor:
    """Entropy of the distributions: float32 [C]."""
    return stats_4C[1].log() - stats_4C[3] / stats_4C[1]
