"""The prompts and traces of a run. Only rank 0 holds them; the other ranks know what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from rlad_megatron.config import RunConfig
from rlad_megatron.data.prompts import Splits, build_splits, build_traces, fitting_traces, without_held_out
from rlad_megatron.data.table import Prompts
from rlad_megatron.data.tokenizers import load_tokenizer
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.config_json import read_model_spec, read_specs
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.servers.sampling import PROBE_PROMPTS, fitting_prompts, max_model_len
from rlad_megatron.types import Prompt

FIRST_ROWS = 5000  # of a source are checked before the start; rank 0 reads the others
Traces = list[tuple[Prompt, list[int]]]


@dataclass(frozen=True)
class FittingPrompts:
    """The prompts of both splits that a run can use."""

    train: Prompts
    test: Prompts
    dropped: int  # of both, too long


@dataclass(frozen=True)
class RunPrompts:
    """What a rank knows about the prompts of its run."""

    held: FittingPrompts | None  # on rank 0
    max_model_len: int  # tokens of the longest prompt and of the longest response
    dropped: int  # prompts that are too long
    probe: list[tuple[int, ...]]  # the tokens of a few held-out prompts


def read_prompts(config: RunConfig) -> RunPrompts:
    """Read, render and tokenise the run's prompts, on rank 0. Collective; every rank raises rank 0's error."""
    held: list[FittingPrompts] = []

    def read() -> RunPrompts:
        splits = build_splits(config.data, load_tokenizer(config.student.path))
        prompts = fit(config, read_specs(config), splits)
        for split, before, after in (("train", splits.train, prompts.train), ("test", splits.test, prompts.test)):
            print_dropped(len(before) - len(after), len(before), f"prompts to {split} on")
        held.append(prompts)
        probe = [prompt.tokens for prompt in prompts.test[:PROBE_PROMPTS]]
        return RunPrompts(None, max_model_len(config, prompts.train, prompts.test), prompts.dropped, probe)

    common = on_first_rank(read, dist.group.WORLD)
    return RunPrompts(held[0] if held else None, common.max_model_len, common.dropped, common.probe)


def fit(config: RunConfig, specs: Mapping[str, ModelSpec], splits: Splits) -> FittingPrompts:
    """What fits of both splits. specs: of `read_specs`. Raises ConfigError as `fitting_prompts`."""
    train, dropped = fitting_prompts(config, specs, splits.train, "train")
    test, dropped_test = fitting_prompts(config, specs, splits.test, "test")
    return FittingPrompts(train, test, dropped + dropped_test)


def print_dropped(count: int, total: int, what: str) -> None:
    if count:
        print(f"data: dropping {count} of {total} {what}, which are too long", flush=True)


def read_traces(config: RunConfig) -> Traces:
    """The traces to fine-tune on: not of held-out prompts, and within the model's positions. Empty on ranks above 0.

    Collective; every rank raises rank 0's error, which is one of `build_traces` or `fitting_traces`, or a ConfigError
    if there are fewer than `sft.batch_size`.
    """
    traces: Traces = []

    def read() -> None:
        tokenizer = load_tokenizer(config.student.path)
        found = build_traces(config.data, config.sft, tokenizer)
        built = without_held_out(found, config.data, tokenizer) if config.sft.traces else found
        if held_out := len(found) - len(built):
            print(f"data: leaving out {held_out} of {len(found)} traces, whose prompts are held out", flush=True)
        traces.extend(check_traces(config, built, read_model_spec(config.student.path).max_position_embeddings))
        print_dropped(len(built) - len(traces), len(built), "traces")

    on_first_rank(read, dist.group.WORLD)
    return traces


def check_traces(config: RunConfig, built: Traces, positions: int) -> Traces:
    """Those that fit. Raises ConfigError as `fitting_traces`, or if they are fewer than `sft.batch_size`."""
    traces = fitting_traces(built, config.data.max_prompt_tokens, positions)
    if len(traces) < config.sft.batch_size:
        raise ConfigError(f"sft.batch_size={config.sft.batch_size} exceeds the {len(traces)} traces; use fewer")
    return traces
