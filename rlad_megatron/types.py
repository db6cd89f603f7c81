"""The data that travels through a run, in the order in which it is made.

Shape letters: P prompt tokens, R response tokens, T tokens of a packed micro-batch, N of them with loss; L layers, K
experts of a token.
All log-probs are in nats; `log_probs[t]` belongs to `tokens[t]`, given everything before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reward workers use this module without torch
    import numpy as np
    import torch


EVALUATION = -1  # the round of every evaluation: the same seeds each time, so only the weights make a difference


@dataclass(frozen=True)
class Prompt:
    """One question, rendered and tokenised.

    Example: Prompt(id="kk/2/17", tokens=(1, 44, ...), answer="(1) Zoey is a knight ...", subset="PPL2", text="...")
    """

    id: str  # unique in its source
    tokens: tuple[int, ...]  # [P] what the model sees, chat template included
    answer: str  # gold answer, in the form the reward reads
    subset: str  # evaluation is reported by subset, e.g. "PPL2"
    text: str  # the rendered question, for people
    metadata: dict[str, Any] = field(default_factory=dict)  # what else a reward may need


@dataclass
class Rollout:
    """One sampled response to one prompt.

    Example: Rollout(prompt, tokens=[5, 9, 2], log_probs=[-0.1, -2.3, -0.0], finish_reason="stop", versions=[(3, 3)])
    """

    prompt: Prompt
    tokens: list[int]  # [R] as sampled, end-of-sequence token included; never re-tokenised
    log_probs: list[float]  # [R] the sampler's own, at the temperature it sampled with
    finish_reason: str  # "stop" (the model ended it) or "length" (cut off)
    versions: list[tuple[int, int]]  # run lengths: a version of the weights, and how many tokens it sampled
    text: str = ""  # the decoded response
    reward: float = 0.0
    solved: bool = False
    reward_parts: dict[str, float] = field(default_factory=dict)
    teacher_log_probs: torch.Tensor | None = None  # float32 [R], if a remote teacher has scored it already
    # uint8 or uint16 [P + R - 1, L, K]: the sampler's choice, with rollout.router_replay. It never read the last token.
    experts: np.ndarray | None = None


@dataclass
class Group:
    """All responses to one prompt of a round.

    Example: Group(round=3, index=0, rollouts=[Rollout(...), Rollout(...)])
    """

    round: int  # the step that it is for, or EVALUATION
    index: int  # of its prompt in the round
    rollouts: list[Rollout]


@dataclass
class Sample:
    """One response ready for training: prompt and response in one sequence.

    The response occupies positions P .. P+R-1 of `tokens`. Per-token tensors have length R.

    Example: Sample(tokens=tensor([7, 8, 5, 9, 2]), prompt_length=2, weight=tensor([0.1, 0.1, 0.1]), advantage=-0.5)
    """

    tokens: torch.Tensor  # int64 [P + R]
    prompt_length: int  # P
    weight: torch.Tensor  # float32 [R] share of each token in the loss; see objectives/aggregate.py
    advantage: float = 0.0
    sampler_log_probs: torch.Tensor | None = None  # float32 [R]
    teacher_log_probs: torch.Tensor | None = None  # float32 [R]
    old_log_probs: torch.Tensor | None = None  # float32 [R]
    reference_log_probs: torch.Tensor | None = None  # float32 [R]
    experts: torch.Tensor | None = None  # uint8 or uint16 [P + R - 1, L, K], as in `Rollout`
    watched: bool = False  # its update fills in `token_stats`
    token_stats: dict[str, torch.Tensor] | None = None  # float32 [R] each, of the loss (trainer/token_record.py)
    solved: bool | None = None  # by the reward; None without one

    @property
    def response_length(self) -> int:
        return self.tokens.numel() - self.prompt_length


@dataclass(frozen=True)
class TokenBatch:
    """What the loss needs to know about N response tokens, besides the student's log-probs. float32 [N] each.

    Example: TokenBatch(weight=tensor([0.5, 0.5]), advantage=tensor([1.0, 1.0]), old_log_probs=tensor([-0.1, -2.3]))
    """

    weight: torch.Tensor  # share of each token in the loss
    advantage: torch.Tensor
    sampler_log_probs: torch.Tensor | None = None
    teacher_log_probs: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None
    reference_log_probs: torch.Tensor | None = None
    # Over the response to which a token belongs: of log pi_S - log pi_old with objective.ratio=sequence, otherwise of
    # what the objective asks for (`averaged` in its file).
    response_mean: torch.Tensor | None = None
    solved: torch.Tensor | None = None  # 1 in responses that the reward calls solved, else 0; only for metrics

    def __getitem__(self, tokens: slice | torch.Tensor) -> TokenBatch:
        return self._map(lambda value: value[tokens])

    def to(self, device: torch.device) -> TokenBatch:
        """A copy on `device`. The host does not wait for it."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def with_old(self, log_probs: torch.Tensor) -> TokenBatch:
        """Fills in pi_old, unless it is given, with the student's float32 [N] log-probs of this forward pass.

        With one optimizer update per rollout batch they are the same, and no pass is needed for pi_old.
        """
        return self if self.old_log_probs is not None else replace(self, old_log_probs=log_probs.detach())

    def with_sequence_ratio(self, log_probs: torch.Tensor) -> TokenBatch:
        """With a pi_old whose ratio to pi_S has the value of the response's, and the gradient of the token's.

        This is GSPO-token (arXiv 2507.18071, eq. 13), whose gradient is GSPO's if a response has one advantage.
        """
        if self.response_mean is None:  # pi_old is the student of this pass, and both ratios are 1
            return self
        return replace(self, old_log_probs=log_probs.detach() - self.response_mean)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenBatch:
        return TokenBatch(**{name: None if value is None else function(value) for name, value in vars(self).items()})


@dataclass
class Microbatch:
    """Several samples packed into one sequence, padded at the end; under context parallelism a rank's share of it.

    The prediction at position t is for token t+1, so the loss is at positions P-1 .. P+R-2 of each sample.
    Only `data/packing.py` does that shift. A share has T tokens and N of the losses (parallel/context.py).
    """

    tokens: torch.Tensor  # int64 [1, T]
    positions: torch.Tensor  # int64 [1, T] restart at 0 in each sample
    segment_starts: torch.Tensor  # int32 [S + 1] cumulative lengths, always of the whole; the last may be padding
    loss_positions: torch.Tensor  # int64 [N] where in `tokens` the predictions are that carry loss, over all samples
    targets: torch.Tensor  # int64 [N] the token predicted at each of them
    per_token: TokenBatch
    loss_indices: torch.Tensor  # int64 [N] which of the whole's losses these are
    samples: list[int]  # indices of the samples, in order
    response_lengths: torch.Tensor  # int64 [S], those of the samples
    experts: torch.Tensor | None = None  # uint8 or uint16 [T, L, K] to which tokens go; None: the router chooses


@dataclass
class StepResult:
    """What one optimizer update reports. Metrics are global."""

    metrics: dict[str, float]
    skipped: bool = False  # a non-finite loss or gradient: parameters are unchanged
