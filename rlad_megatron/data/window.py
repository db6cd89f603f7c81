"""Which prompts each round has: those of the rounds in progress, and those that wait for a later one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rlad_megatron.data.prompts import PromptSource
from rlad_megatron.errors import DataError
from rlad_megatron.types import Prompt


class PromptWindow:
    """Rounds of prompts. Every prompt of the source is used once an epoch, whatever the responses' lengths.

    A round begins with `extra` prompts beyond the `size` that it needs. The slowest are deferred, whole, until they
    fill a round without extras (tail batching, as in RollPacker, arXiv 2509.21009). A round grows by the prompts that
    replace others (data/quota.py).
    """

    def __init__(self, source: PromptSource, size: int, extra: int = 0) -> None:
        self.size = size
        self._source, self._extra = source, extra
        self._rounds: dict[int, list[Prompt]] = {}  # begun, by number
        self._deferred: list[Prompt] = []

    def round(self, number: int) -> list[Prompt]:
        """The prompts of a round, drawn when it is first asked for."""
        if number not in self._rounds:
            if len(self._deferred) >= self.size:
                self._rounds[number], self._deferred = self._deferred[: self.size], self._deferred[self.size :]
            else:
                self._rounds[number] = self._source.next_batch(self.size + self._extra)
        return self._rounds[number]

    def grow(self, number: int) -> None:
        """Add a prompt to the list that `round` returned: the next of the source, or one that waits."""
        self._rounds[number] += [self._deferred.pop(0)] if self._deferred else self._source.next_batch(1)

    def close(self, number: int, used: Collection[int]) -> None:
        """End a round. used: indices of its prompts that were trained on; the others are deferred."""
        self._deferred += [prompt for i, prompt in enumerate(self._rounds.pop(number)) if i not in used]

    def state_dict(self) -> dict[str, Any]:
        """Rounds in progress are saved as begun: a resumed run samples them again."""
        return self._source.state_dict() | {
            "rounds": {number: [prompt.id for prompt in prompts] for number, prompts in self._rounds.items()},
            "deferred": [prompt.id for prompt in self._deferred],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state was saved with other prompts or another seed."""
        self._source.load_state_dict(state)
        index = {name: i for i, name in enumerate(self._source.prompts.ids)}
        # Absent in earlier checkpoints.
        saved, deferred = state.get("rounds", {}), state.get("deferred", [])
        try:
            prompts = self._source.prompts
            rounds = {int(number): [prompts[index[name]] for name in names] for number, names in saved.items()}
            self._deferred = [prompts[index[name]] for name in deferred]
        except KeyError as error:
            raise DataError(
                f"the checkpoint has a prompt of id {error}, which the data lacks; resume with the same data.*"
            ) from error
        begun = self.size + self._extra  # a resumed round grows again, perhaps by fewer prompts
        self._rounds = {number: prompts[:begun] for number, prompts in rounds.items() if len(prompts) >= self.size}
        # Rounds of a smaller rollout.prompts_per_step cannot fill one now. Their prompts come first.
        small = [prompt for prompts in rounds.values() if len(prompts) < self.size for prompt in prompts]
        grown = [prompt for prompts in rounds.values() for prompt in prompts[begun:]]
        self._deferred = small + grown + self._deferred
