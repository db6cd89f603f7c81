"""What the loss computes at each token of a few samples, for people who look at a run (observe/rollouts.py)."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist

from rlad_megatron.parallel.context import join
from rlad_megatron.parallel.fused_linear_loss import TokenStats
from rlad_megatron.types import Microbatch, Sample


class TokenRecord:
    """The loss's statistics at the tokens of the watched samples (`Sample.watched`) of one update.

    `add` keeps only references, so the host does not wait for a device during the passes; samples that are not watched
    cost nothing. Every rank is told the same samples.
    """

    def __init__(self) -> None:
        self._watched: list[Sample] = []
        self._found: list[tuple[list[Sample], Microbatch, TokenStats]] = []

    def watch(self, samples: list[Sample]) -> None:
        """Samples of the update, before their gradients are computed."""
        self._watched += [sample for sample in samples if sample.watched]

    def add(self, samples: list[Sample], microbatch: Microbatch, stats: TokenStats) -> None:
        """A micro-batch of these samples. stats: detached [N] tensors of its loss."""
        if any(samples[i].watched for i in microbatch.samples):
            self._found.append((samples, microbatch, stats))

    def finish(self, *, counted: bool) -> None:
        """Fill in `Sample.token_stats` of the watched samples, on rank 0. Collective over the world.

        counted: whether this rank's tokens count, which is so on one rank of each model copy.
        """
        if not self._watched:
            return
        place = {id(sample): n for n, sample in enumerate(self._watched)}
        own: dict[int, TokenStats] = defaultdict(dict)  # by place; 0 at tokens that other context-parallel ranks hold
        for samples, microbatch, stats in self._found if counted else ():
            for name, values_N in stats.items():
                of_sample = {i: torch.zeros(samples[i].response_length) for i in microbatch.samples}
                join(values_N.float().cpu(), microbatch, of_sample)
                for i, values_R in of_sample.items():
                    if samples[i].watched:
                        own[place[id(samples[i])]][name] = values_R
        of_ranks: list[dict[int, TokenStats]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(dict(own), of_ranks)
        for n, sample in enumerate(self._watched) if of_ranks is not None else ():
            parts = [of_rank[n] for of_rank in of_ranks or () if n in of_rank]
            sample.token_stats = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
