"""`rlad data`: what a run would see of its data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from rlad_megatron.config import ObjectiveConfig, RunConfig, TrainConfig
from rlad_megatron.config.recipe import apply_overrides, load_run, recipe_names
from rlad_megatron.data.presets import HUB, KNIGHTS_AND_KNAVES, PRESETS, reward_name
from rlad_megatron.data.prompts import Splits, build_splits
from rlad_megatron.data.tokenizers import load_tokenizer
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.config_json import read_specs
from rlad_megatron.rewards.answers import unreadable_answers
from rlad_megatron.rewards.registry import load_reward
from rlad_megatron.servers.sampling import prompt_limit

SHOWN_PROMPTS = 3
SHOWN_ANSWERS = 3
SHOWN_SUBSETS = 20
BINS, BAR = 12, 40  # of a histogram, and the characters of its longest bar


def data_config(name: str, overrides: list[str]) -> RunConfig:
    """The configuration of a recipe, or one whose data.source is `name`.

    Raises ConfigError if it is neither a recipe nor a source.
    """
    if name.endswith((".py", ".yaml", ".yml")) or name in recipe_names():
        return load_run(name, overrides)
    known = name in PRESETS or name == KNIGHTS_AND_KNAVES or name.startswith(HUB)
    if not (known or Path(name).exists() or "*" in name):
        raise ConfigError(
            f"{name!r} is neither a recipe nor data; give a recipe ({', '.join(recipe_names())}), a preset "
            f"({', '.join(PRESETS)}), hf:OWNER/NAME, or files that exist"
        )
    # GRPO, because there need not be a teacher.
    config = RunConfig(objective=ObjectiveConfig(name="grpo"), train=TrainConfig(gpus_per_node=0))
    config = apply_overrides(replace(config, data=replace(config.data, source=name)), overrides)
    if not config.student.path:
        raise ConfigError(f"student.path is empty; name a model that counts tokens: rlad data {name} student.path=...")
    return config


def print_data(config: RunConfig, console: Console) -> None:
    """Counts, lengths, what is dropped, duplicates, unreadable answers, and a few prompts as the model sees them.

    Raises as `build_splits` and `load_reward`.
    """
    load_reward(reward_name(config.data))
    specs, tokenizer = read_specs(config), load_tokenizer(config.student.path)
    splits = build_splits(config.data, tokenizer)
    limit, why, _ = prompt_limit(config, specs)
    console.print(_counts(splits, limit))
    console.print(f"Longest prompt that fits: {limit} tokens ({why}).", soft_wrap=True)
    if splits.skipped:
        console.print(f"Not trained on, because they are held out too: {splits.skipped} prompts.")
    if shared := set(splits.train.contents()) & set(splits.test.contents()):
        console.print(f"In both parts, so that evaluation measures what was trained on: {len(shared)} prompts.")
    for name, prompts in splits.items():
        if len(prompts):
            console.print(_histogram(f"\nTokens of {name} prompts", prompts.lengths, limit))
        for problem in islice(unreadable_answers(config.data, prompts), SHOWN_ANSWERS):
            console.print(escape(str(problem)), style="bold", soft_wrap=True)
    for prompt in splits.train[:SHOWN_PROMPTS]:
        shown = f"{escape(tokenizer.decode_whole(list(prompt.tokens)))}\n[dim]answer:[/] {escape(prompt.answer)}"
        console.print(Panel(shown, title=escape(f"{prompt.id} ({prompt.subset})"), title_align="left"))


def _counts(splits: Splits, limit: int) -> Table:
    table = Table("", "prompts", "fit", "too long", "repeated", "tokens: least", "median", "95%", "most", "mean")
    for name, prompts in splits.items():
        lengths, count = prompts.lengths, len(prompts)
        fit, distinct = int((lengths <= limit).sum()), len(set(prompts.contents()))
        row: list[float] = [count, fit, count - fit, count - distinct]
        if count:
            row += [float(np.percentile(lengths, share)) for share in (0, 50, 95, 100)] + [float(lengths.mean())]
        table.add_row(name, *(f"{value:,.0f}" for value in row))
        subsets = Counter(prompts.subsets)
        for subset, share in subsets.most_common(SHOWN_SUBSETS) if len(subsets) > 1 else []:
            table.add_row(f"  {escape(subset)}", f"{share:,}")
        if len(subsets) > SHOWN_SUBSETS:
            table.add_row(f"  and {len(subsets) - SHOWN_SUBSETS} more")
    return table


def _histogram(title: str, lengths: np.ndarray, limit: int) -> Table:
    least, most = int(lengths.min()), int(lengths.max())
    width = -(-(most + 1 - least) // BINS)
    counts, edges = np.histogram(lengths, bins=range(least, most + width + 1, width))
    table = Table("tokens", "prompts", "", title=title, title_justify="left", box=None)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        cut = " too long" if low > limit else ""
        span = f"{low} to {high - 1}" if width > 1 else str(low)
        table.add_row(span, f"{count:,}", "█" * -(-int(count) * BAR // int(counts.max())) + cut)
    return table
