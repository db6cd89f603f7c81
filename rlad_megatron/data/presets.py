"""Published data sets by name: where they are on the Hugging Face hub, their columns, and the reward that fits.

Which of them were checked against the real data: docs/data.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlad_megatron.config import DataConfig
from rlad_megatron.data.knights_and_knaves import SYSTEM_PROMPT
from rlad_megatron.errors import ConfigError

KNIGHTS_AND_KNAVES = "knights_and_knaves"
HUB = "hf:"
BOXED = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Preset:
    """A data set of the hub."""

    train: str  # OWNER/NAME:CONFIG:SPLIT, CONFIG may be empty; "": it has no training part
    test: str  # the same for evaluation
    columns: Mapping[str, str]
    reward: str
    template: str = ""
    system: str = ""  # the system message; "": none
    subset: str = ""  # of its prompts, if no column says it; "": the preset's name


def _math(train: str, test: str, **columns: str) -> Preset:
    return Preset(train, test, columns, reward="math", template=BOXED)


def _puzzles(people: int) -> Preset:
    name, split = "K-and-K/knights-and-knaves", f"{people}ppl"
    return Preset(
        f"{name}:train:{split}",
        f"{name}:test:{split}",
        {"prompt": "quiz", "answer": "solution_text_format"},
        reward=KNIGHTS_AND_KNAVES,
        system=SYSTEM_PROMPT,
        subset=f"PPL{people}",
    )


PRESETS: dict[str, Preset] = {
    "gsm8k": _math("openai/gsm8k:main:train", "openai/gsm8k:main:test", prompt="question", answer="answer"),
    "math500": _math("", "HuggingFaceH4/MATH-500::test", prompt="problem", answer="answer", subset="subject"),
    # The original repeats each prompt about a hundred times and asks for "Answer: ..." in place of a box.
    "dapo_math_17k": _math("open-r1/DAPO-Math-17k-Processed:all:train", "", prompt="prompt", answer="solution"),
    "openr1_math": _math("open-r1/OpenR1-Math-220k:default:train", "", prompt="problem", answer="answer"),
    "aime24": _math("", "math-ai/aime24::test", prompt="problem", answer="solution"),
    "aime25": _math("", "math-ai/aime25::test", prompt="problem", answer="answer"),
    **{f"kk_{people}ppl": _puzzles(people) for people in range(2, 9)},
}


@dataclass(frozen=True)
class Source:
    """One of data.source and data.eval_source, and how its rows become prompts."""

    key: str  # "data.source", for errors
    name: str  # a path, a pattern, or hf:...
    columns: Mapping[str, str] = field(default_factory=dict)  # by our names; empty: the columns have our names
    template: str = ""
    system: str = ""
    subset: str = "all"  # of rows that have none


def train_source(config: DataConfig) -> Source:
    """Where training prompts come from, unless they are generated puzzles.

    Raises ConfigError for a preset that is for evaluation only.
    """
    preset = PRESETS.get(config.source)
    if preset is None:
        return Source("data.source", config.source, config.columns, config.template)
    if not preset.train:
        raise ConfigError(
            f"data.source={config.source} has no part to train on; use it as data.eval_source, and one of "
            f"{', '.join(name for name, other in PRESETS.items() if other.train)} as data.source"
        )
    return _of_preset("data.source", config.source, preset, preset.train, config)


def eval_source(config: DataConfig) -> Source | None:
    """Where held-out prompts come from; None: they are a part of `data.source`. A preset's own are its test split.

    Raises ConfigError for a preset that is for training only.
    """
    name = config.eval_source or config.source
    preset = PRESETS.get(name)
    if preset is not None and preset.test:
        return _of_preset("data.eval_source", name, preset, preset.test, config)
    if not config.eval_source:
        return None
    if preset is None:
        return Source("data.eval_source", name, config.columns, config.template)
    raise ConfigError(
        f"data.eval_source={name} has no part for evaluation; use one of "
        f"{', '.join(other for other in PRESETS if PRESETS[other].test)}, or leave it empty to hold prompts out"
    )


def _of_preset(key: str, name: str, preset: Preset, where: str, config: DataConfig) -> Source:
    return Source(
        key, HUB + where, preset.columns, config.template or preset.template, preset.system, preset.subset or name
    )


def reward_name(config: DataConfig) -> str:
    """`data.reward`, with "auto" resolved. Raises ConfigError if the sources do not decide it."""
    if config.reward != "auto":
        return config.reward
    rewards = {
        name: KNIGHTS_AND_KNAVES if name == KNIGHTS_AND_KNAVES else PRESETS[name].reward
        for name in (config.source, config.eval_source)
        if name in PRESETS or name == KNIGHTS_AND_KNAVES
    }
    if len(set(rewards.values())) == 1:
        return next(iter(rewards.values()))
    if rewards:
        raise ConfigError(
            f"data.reward=auto: data.source={config.source} and data.eval_source={config.eval_source} have different "
            f"rewards ({', '.join(rewards.values())}); use sources with the same reward, or set data.reward"
        )
    raise ConfigError(
        f"data.reward=auto: data.source={config.source} has no reward of its own; set data.reward to math, "
        "math_lenient, knights_and_knaves, or module:function"
    )
