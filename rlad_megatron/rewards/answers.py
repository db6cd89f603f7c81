"""Whether a reward can read the gold answers, before a response exists."""

from __future__ import annotations

from collections.abc import Iterator

from rlad_megatron.config import DataConfig
from rlad_megatron.data.presets import reward_name
from rlad_megatron.data.table import Prompts
from rlad_megatron.errors import DataError
from rlad_megatron.rewards.registry import REWARDS, load_reward


def check_answers(config: DataConfig, prompts: Prompts) -> None:
    """Raise DataError for the first prompt whose answer the reward cannot read. Must run in the main thread."""
    for problem in unreadable_answers(config, prompts):
        raise problem


def unreadable_answers(config: DataConfig, prompts: Prompts) -> Iterator[DataError]:
    """An error for each answer that data.reward cannot read, naming its row and value.

    Only for rewards of this repository: they score an empty response in no time, and have no side effects.
    """
    name = reward_name(config)
    if name not in REWARDS:
        return
    reward, known = load_reward(name), set()
    for index in range(len(prompts)):
        prompt = prompts[index]
        if prompt.answer in known:
            continue
        known.add(prompt.answer)
        try:
            reward(prompt, "")
        except DataError:
            answer = prompt.answer if len(prompt.answer) <= 80 else f"{prompt.answer[:80]}..."
            remedy = (
                "set data.columns.answer to the column that has the final answer, or data.reward to one that reads it"
            )
            yield DataError(f"{prompts.where(index)}: data.reward={name} cannot read the answer {answer!r}; {remedy}")
