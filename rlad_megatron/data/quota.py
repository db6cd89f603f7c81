"""How many groups a round samples, and which of them its update counts (dynamic sampling, DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlad_megatron.config import RunConfig
from rlad_megatron.data.samples import trained_rollouts
from rlad_megatron.types import Group, Sample


class GroupQuota:
    """Counts the groups of a round as they finish.

    A round samples `rollout.prompts_per_step` groups. With `objective.dynamic_sampling` it samples one more for each
    group that has nothing to train on, until it has that many groups in all. Every group that was begun is waited for
    and used, so none is preferred for its length, and which prompts a round uses does not depend on timing: they are
    the shortest beginning of the stream of prompts that holds enough groups.
    """

    def __init__(self, config: RunConfig) -> None:
        self._objective = config.objective
        self._needed = config.rollout.prompts_per_step
        self._bound = max(self._needed, config.objective.dynamic_sampling)
        self._finished = self._empty = 0

    def take(self, groups: Iterable[Group]) -> None:
        """Count finished groups."""
        for group in groups:
            self._finished += 1
            self._empty += not trained_rollouts(group.rollouts, self._objective)

    @property
    def sampled(self) -> int:
        """Groups that the round samples, as far as is known."""
        return min(self._needed + self._empty, self._bound)

    @property
    def is_full(self) -> bool:
        """Whether every group that the round samples is finished."""
        return self._finished == self.sampled


def counted_groups(found: Sequence[tuple[Group, list[Sample]]], needed: int) -> list[tuple[Group, list[Sample]]]:
    """Of a round's groups and their samples the `needed` ones that the update counts, in the order of prompts.

    Groups with samples; if the bound left too few of them, also the first ones without, which count as zeros in the
    mean as they do without dynamic sampling.
    """
    missing = needed - sum(bool(samples) for _, samples in found)
    counted = []
    for pair in sorted(found, key=lambda pair: pair[0].index):
        if pair[1] or missing > 0:
            counted.append(pair)
            missing -= not pair[1]
    return counted


def sampling_metrics(found: Sequence[tuple[Group, list[Sample]]], needed: int) -> dict[str, float]:
    """`rollout/...`: groups that were replaced, and groups that the update lacks because the bound was reached."""
    trained = sum(bool(samples) for _, samples in found)
    return {"rollout/replaced_groups": float(len(found) - needed), "rollout/missing_groups": float(needed - trained)}
