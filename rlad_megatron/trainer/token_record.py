"""What the loss computes at each token of a few samples, for people who look at a run (observe/rollouts.py)."""

from __future__ import annotations

import numpy as np
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
        own = self._own() if counted else ([], {})
        of_ranks: list[tuple[list[str], dict[int, np.ndarray]]] | None = None
        if dist.get_rank() == 0:
            of_ranks = [own] * dist.get_world_size()
        dist.gather_object(own, of_ranks)
        for n, sample in enumerate(self._watched) if of_ranks else ():
            # A token is 0 on the ranks that do not hold it.
            found = [(names, values[n]) for names, values in of_ranks or () if n in values]
            whole_RK = torch.from_numpy(sum(values for _, values in found))
            sample.token_stats = dict(zip(found[0][0], whole_RK.unbind(1), strict=True))

    def _own(self) -> tuple[list[str], dict[int, np.ndarray]]:
        """The names of K statistics, and float32 [R, K] of each watched sample that this rank holds tokens of."""
        place = {id(sample): n for n, sample in enumerate(self._watched)}
        names: list[str] = []
        own: dict[int, np.ndarray] = {}
        for samples, microbatch, stats in self._found:
            names = list(stats)
            values_NK = torch.stack([values.float() for values in stats.values()], dim=1).cpu()
            of_sample = {i: torch.zeros(samples[i].response_length, len(names)) for i in microbatch.samples}
            join(values_NK, microbatch, of_sample)
            own |= {place[id(samples[i])]: it.numpy() for i, it in of_sample.items() if samples[i].watched}
        return names, own
