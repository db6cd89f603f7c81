"""How long responses are expected to be: assumed, given by the user, or those that a run has kept. Torch-free."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import ConfigError

# Assumed where nothing is said. Both are of our choosing; a task's own figures may be far away.
MEAN_SHARE = 1 / 3  # mean response, as a share of rollout.sampling.max_tokens
SPREAD = 0.7  # standard deviation of the logarithm of a response's length
MOST_SPREAD = 5.0  # above, lengths differ by orders of magnitude
PROMPT_TOKENS = 256  # capped by data.max_prompt_tokens and the longest response


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses, and the share of groups with a gradient."""

    longest: int  # response
    prompt: float  # mean of a prompt
    mean: float  # response, with those that are cut at `longest`
    spread: float  # standard deviation of the logarithm, of a log-normal distribution before the cut
    trained: float = 1.0  # share of groups that are scored by the teacher and trained on
    kept: tuple[int, ...] = ()  # responses of a run, which take the place of the distribution
    source: str = "assumed"

    def draw(self, count: int, seed: int) -> list[int]:
        """Tokens of so many responses, from 1 to `longest`; the same for the same seed."""
        chance = random.Random(seed)
        if self.kept:
            return chance.choices(self.kept, k=count)
        center = self._center() if self.spread else math.log(self.mean)
        drawn = (chance.lognormvariate(center, self.spread) for _ in range(count))
        return [max(1, min(self.longest, round(length))) for length in drawn]

    def _center(self) -> float:
        """The mean of the logarithm before the cut, by bisection."""
        low = math.log(self.mean) - self.spread**2 / 2  # where nothing is cut
        high = math.log(self.longest) + 10 * self.spread  # where all is
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_after_cut(middle) < self.mean else (low, middle)
        return low

    def _mean_after_cut(self, center: float) -> float:
        """E[min(X, longest)] of log-normal X; spread > 0."""
        below = (math.log(self.longest) - center) / self.spread  # of a standard normal
        share = NormalDist().cdf
        return math.exp(center + self.spread**2 / 2) * share(below - self.spread) + self.longest * share(-below)

    def __str__(self) -> str:
        what = f"log-normal responses, mean {self.mean:.0f}, spread {self.spread:g} ({self.source})"
        if self.kept:
            what = f"{len(self.kept)} responses of {self.source}, mean {self.mean:.0f}"
        return f"{what}, at most {self.longest}; prompts of {self.prompt:.0f}; {self.trained:.0%} of groups trained on"


def expected_lengths(config: RunConfig, given: str = "") -> Lengths:
    """The lengths that a plan counts with.

    given: MEAN or MEAN,SPREAD of a log-normal distribution, or a run folder, whose kept rollouts are taken; empty: the
    assumed distribution.

    Raises:
        ConfigError: `given` is none of these, or the folder has no rollouts.
    """
    longest = config.rollout.sampling.max_tokens
    prompt = min(config.data.max_prompt_tokens or PROMPT_TOKENS, longest, PROMPT_TOKENS)
    assumed = Lengths(longest, prompt, longest * MEAN_SHARE, SPREAD)
    if not given:
        return assumed
    if Path(given).is_dir():
        return _of_run(config, assumed, Path(given))
    try:
        mean, spread = map(float, given.split(",")) if "," in given else (float(given), SPREAD)
    except ValueError:
        raise ConfigError(
            f"--responses={given} is neither a run folder nor MEAN or MEAN,SPREAD; use for example --responses=4000,0.7"
        ) from None
    if not (0 < mean <= longest and 0 <= spread <= MOST_SPREAD):
        raise ConfigError(
            f"--responses={given}: the mean must be above 0 and at most rollout.sampling.max_tokens={longest}, and the "
            f"spread from 0 to {MOST_SPREAD:g}; use for example --responses={longest * MEAN_SHARE:.0f},{SPREAD}"
        )
    return replace(assumed, mean=mean, spread=spread, source="given")


def _of_run(config: RunConfig, assumed: Lengths, folder: Path) -> Lengths:
    """From `rollouts/` of a run folder, which holds the first rollout of some groups of each step."""
    rows = [row for file in sorted((folder / "rollouts").glob("step_*.jsonl")) for row in _rows(file)]
    if not rows:
        raise ConfigError(
            f"--responses={folder} has no rollouts in {folder / 'rollouts'} (observe.rollouts_per_step); give a run "
            "that kept some, or MEAN,SPREAD"
        )
    kept = tuple(min(len(row["response_tokens"]), assumed.longest) for row in rows)
    prompt = sum(len(row["prompt_tokens"]) for row in rows) / len(rows)
    trained = 1.0
    if config.objective.drops_zero_advantage:  # all advantages of a group with equal rewards are 0
        trained = sum(row["advantage"] != 0 for row in rows) / len(rows)
    return replace(assumed, prompt=prompt, mean=sum(kept) / len(kept), kept=kept, trained=trained, source=str(folder))


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rollouts of a file that have tokens. Texts in it may hold any line separator but the newline."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise ConfigError(
            f"--responses: {file} has a line that is not whole ({error}); if a run is writing it, wait, else remove it"
        ) from error
    return [row for row in rows if row.get("response_tokens")]
