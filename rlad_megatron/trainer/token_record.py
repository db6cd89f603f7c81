"""What the loss computes at each token of a few samples, for people who look at a run (observe/rollouts.py).

Shape letters: N loss-carrying tokens of a micro-batch, R tokens of a response, W those of all watched samples, K
statistics.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist

from rlad_megatron import platform
from rlad_megatron.parallel.fused_linear_loss import TokenStats
from rlad_megatron.types import Microbatch, Sample


class TokenRecord:
    """The loss's statistics at the tokens of the watched samples (`Sample.watched`) of one update.

    `add` keeps only references, so the host does not wait for a device during the passes; samples that are not watched
    cost nothing. Every rank is told the same samples.
    """

    def __init__(self) -> None:
        self._watched: list[Sample] = []
        self._names: list[str] = []
        self._found: list[tuple[list[Sample], Microbatch, TokenStats]] = []

    def watch(self, samples: list[Sample]) -> None:
        """Samples of the update, before their gradients are computed."""
        self._watched += [sample for sample in samples if sample.watched]

    def add(self, samples: list[Sample], microbatch: Microbatch, stats: TokenStats) -> None:
        """A micro-batch of these samples. stats: detached [N] tensors of its loss."""
        self._names = list(stats)
        if any(samples[i].watched for i in microbatch.samples):
            self._found.append((samples, microbatch, stats))

    def finish(self, *, counted: bool) -> None:
        """Fill in `Sample.token_stats` of the watched samples, float32 [R] each, on rank 0. Collective over the world.

        counted: whether this rank's tokens count, which is so on one rank of each model copy.
        """
        if not self._watched:
            return
        # Earlier pipeline stages compute no loss, but join the reduction. The last rank has micro-batches.
        names = [self._names]
        dist.broadcast_object_list(names, src=dist.get_world_size() - 1)
        lengths = [sample.response_length for sample in self._watched]
        values_WK = torch.zeros(sum(lengths), len(names[0]), device=platform.device())
        if counted:
            self._write_own(values_WK, [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)])
        dist.reduce(values_WK, dst=0)  # a token is 0 on the ranks that do not hold it
        if dist.get_rank() == 0:
            for sample, values_RK in zip(self._watched, values_WK.cpu().split(lengths), strict=True):
                sample.token_stats = dict(zip(names[0], values_RK.unbind(1), strict=True))

    def _write_own(self, values_WK: torch.Tensor, starts: list[int]) -> None:
        """Write what this rank holds. starts: the row of each watched sample's first token."""
        start_of = {id(sample): start for sample, start in zip(self._watched, starts, strict=True)}
        for samples, microbatch, stats in self._found:
            rows = [
                torch.arange(start_of[id(it)], start_of[id(it)] + it.response_length)
                if it.watched
                else torch.full((it.response_length,), -1)
                for it in (samples[i] for i in microbatch.samples)
            ]
            rows_N = torch.cat(rows)[microbatch.loss_indices.cpu()]
            held_N = (rows_N >= 0).to(values_WK.device)
            rows_held = rows_N[rows_N >= 0].to(values_WK.device)
            values_WK[rows_held] = torch.stack([stats[name][held_N].float() for name in self._names], dim=1)
