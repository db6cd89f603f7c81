"""The data that travels through a run, in the order in which it is made.

Shape letters: P prompt tokens, R response tokens, T tokens of a packed micro-batch.
All log-probs are in nats; `log_probs[t]` belongs to `tokens[t]`, given everything before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Prompt:
    """One question, already rendered and tokenised.

    Example: Prompt(id="kk/2/17", tokens=(1, 44, ...), answer="(1) Zoey is a knight ...", subset="PPL2", text="...")
    """

    id: str  # unique in its source
    tokens: tuple[int, ...]  # [P] what the model sees, chat template included
    answer: str  # gold answer, in the form that the reward reads
    subset: str  # evaluation is reported by subset, e.g. "PPL2"
    text: str  # the rendered question, for people
    metadata: dict[str, Any] = field(default_factory=dict)  # what a reward may need besides the answer


@dataclass
class Rollout:
    """One sampled response to one prompt.

    Example: Rollout(prompt, tokens=[5, 9, 2], log_probs=[-0.1, -2.3, -0.0], finish_reason="stop", weight_version=3)
    """

    prompt: Prompt
    tokens: list[int]  # [R] as sampled, end-of-sequence token included; never re-tokenised
    log_probs: list[float]  # [R] the sampler's own, at the temperature it sampled with
    finish_reason: str  # "stop" (ended by itself) or "length" (cut off)
    weight_version: int  # the version of the weights that sampled it
    text: str = ""  # the decoded response
    reward: float = 0.0
    solved: bool = False
    reward_parts: dict[str, float] = field(default_factory=dict)


@dataclass
class Sample:
    """One response made ready for training: prompt and response in one sequence.

    The response occupies positions P .. P+R-1 of `tokens`. Per-token tensors have length R.
    """

    tokens: torch.Tensor  # int64 [P + R]
    prompt_length: int  # P
    weight: torch.Tensor  # float32 [R] share of each token in the loss; see objectives/aggregate.py
    advantage: float = 0.0
    sampler_log_probs: torch.Tensor | None = None  # float32 [R]
    teacher_log_probs: torch.Tensor | None = None  # float32 [R]
    old_log_probs: torch.Tensor | None = None  # float32 [R]

    @property
    def response_length(self) -> int:
        return self.tokens.numel() - self.prompt_length


@dataclass
class Microbatch:
    """Several samples packed into one sequence of T tokens, padded at the end.

    Predictions of position t are for token t+1, so the loss lives at positions
    P-1 .. P+R-2 of each sample. `data.packing` does that shift, and nobody else.
    """

    tokens: torch.Tensor  # int64 [1, T]
    positions: torch.Tensor  # int64 [1, T] restart at 0 in each sample
    segment_starts: torch.Tensor  # int32 [S + 1] cumulative lengths; the last segment is the padding
    loss_positions: torch.Tensor  # int64 [N] positions whose prediction carries loss, over all samples
    targets: torch.Tensor  # int64 [N] the token predicted at each of them
    per_token: dict[str, torch.Tensor]  # float32 [N] each: weight, advantage, and the log-probs that are known
    samples: list[int]  # indices of the samples, in order, so that results find their way back


@dataclass
class StepResult:
    """What one optimizer update reports. Sums are already global."""

    metrics: dict[str, float]
    skipped: bool = False  # a non-finite loss or gradient: parameters were left alone
