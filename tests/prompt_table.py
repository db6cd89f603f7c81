"""A table of prompts that a test has made."""

import numpy as np

from rlad_megatron.data.table import Prompts, PromptTable


def as_prompts(prompts):
    """`Prompts` with these ids, tokens, answers and subsets, and without text."""
    table = PromptTable(lambda tokens: "")
    for number, prompt in enumerate(prompts, start=1):
        table.add(
            prompt.tokens, id=prompt.id, answer=prompt.answer, subset=prompt.subset, file="made.jsonl", number=number
        )
    return Prompts(table, np.arange(len(table)))
