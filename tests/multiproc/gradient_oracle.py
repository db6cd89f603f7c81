"""What an update must do, computed without rlad_megatron: float64, one sequence at a time, formulas written out.

The model is the one in `transformers`, with eager attention. The loss follows docs/method.md and the papers named
there, and shares no code with `rlad_megatron.objectives`. Gradients are autograd's, by Hugging Face name.

Shape letters: T tokens of a sequence, R of them in the response, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

Gradients = dict[str, torch.Tensor]


@dataclass
class Response:
    """One response with what the update is told of it. Log-probs are [R] float32 values, in nats."""

    prompt: list[int]
    tokens: list[int]
    reward: float
    teacher: list[float] = field(default_factory=list)
    sampler: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    old: list[float] | None = None  # None: pi_old is pi_S of the same forward pass
    log_pi: list[float] = field(default_factory=list)  # of the model before any update

    @property
    def sequence(self) -> tuple[int, ...]:
        return (*self.prompt, *self.tokens)


@dataclass
class Expected:
    """What some updates in a row must give."""

    before: Gradients  # weights
    gradients: Gradients  # of the first update, before clipping
    norms: list[float] = field(default_factory=list)  # of each update, before clipping
    weights: Gradients = field(default_factory=dict)  # after the last update
    clipped: float = 0.0  # share of the first update's tokens with an advantage whose ratio is clipped
    clamped: float = 0.0  # share of the first update's tokens whose teacher gap is clamped


class _InFloat64(TorchFunctionMode):
    """Models in transformers compute norms, softmax and angles in float32 whatever their dtype; here in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wider(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


class Oracle:
    """A model in float64. `temperature` divides the logits of every log-prob."""

    def __init__(self, folder: str, temperature: float) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        self.temperature = temperature

    def log_probs(self, response: Response) -> torch.Tensor:
        """log pi_S of each response token, [R]."""
        return self.log_probs_and_entropy(response)[0]

    def log_probs_and_entropy(self, response: Response) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi_S of each response token, and the entropy of the distribution that it was drawn from, [R]."""
        with _InFloat64():
            logits_TV = self.model(torch.tensor([response.sequence]), use_cache=False).logits[0]
            assert logits_TV.dtype == torch.float64
            log_probs_TV = torch.log_softmax(logits_TV / self.temperature, dim=-1)
        # What stands at one position predicts the token at the next.
        picked = [log_probs_TV[len(response.prompt) + t - 1, token] for t, token in enumerate(response.tokens)]
        log_probs_TV = log_probs_TV[len(response.prompt) - 1 : -1]
        return torch.stack(picked), -(log_probs_TV.exp() * log_probs_TV).sum(dim=-1)

    def updates(self, batches: list[list[list[Response]]], objective: Any, optimizer: Any) -> Expected:
        """Make one update with each batch (groups of responses), and leave the model changed.

        objective, optimizer: anything with the fields of `config.ObjectiveConfig` and `config.OptimizerConfig`.
        """
        parameters = list(self.model.parameters())
        # Megatron decays no bias and nothing else of one dimension.
        adam = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optimizer.weight_decay},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=1e-8,  # Megatron's default
        )
        expected, before = None, self._by_name({p: p.detach().clone() for p in parameters})
        for groups in batches:
            adam.zero_grad()
            clipped, clamped = self._backward(groups, objective)
            if expected is None:
                gradients = self._by_name({p: p.grad.clone() for p in parameters})
                expected = Expected(before, gradients, clipped=clipped, clamped=clamped)
            expected.norms.append(torch.nn.utils.clip_grad_norm_(parameters, optimizer.clip_grad).item())
            adam.step()
        expected.weights = self._by_name({p: p.detach().clone() for p in parameters})
        return expected

    def _backward(self, groups: list[list[Response]], objective: Any) -> tuple[float, float]:
        """Add the gradient of the loss, one sequence after the other; the shares of clipped and clamped tokens."""
        responses = [response for group in groups for response in group]
        lengths = [len(response.tokens) for response in responses]
        clipped, clamped = [], []
        for group in groups:
            for response, advantage in zip(group, advantages([r.reward for r in group]), strict=True):
                log_pi, entropy = self.log_probs_and_entropy(response)
                surrogate, is_clipped, is_clamped = surrogates(log_pi, response, advantage, objective)
                surrogate = surrogate + objective.entropy_coefficient * entropy
                if objective.reference_kl:
                    log_ratio = torch.tensor(response.reference, dtype=torch.float64) - log_pi
                    surrogate = surrogate - objective.reference_kl * (torch.exp(log_ratio) - log_ratio - 1)
                surrogate = surrogate * mismatch(log_pi, response, objective)
                if objective.aggregation == "sequence_mean":
                    value = surrogate.mean() / len(responses)
                else:
                    value = surrogate.sum() / sum(lengths)
                (-value).backward()
                clamped += is_clamped.tolist()
                clipped += is_clipped.tolist() if advantage else []
        return sum(clipped) / max(len(clipped), 1), sum(clamped) / len(clamped)

    def _by_name(self, values: dict[torch.nn.Parameter, torch.Tensor]) -> Gradients:
        """Values of parameters by the names of a checkpoint, where experts are one by one."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                for expert, gate_up in enumerate(values[parameter]):
                    gate, up = gate_up.chunk(2)
                    found[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                    found[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
            elif name.endswith("experts.down_proj"):
                for expert, down in enumerate(values[parameter]):
                    found[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
            else:
                found[name] = values[parameter]
        return found


def advantages(rewards: list[float]) -> list[float]:
    """(R - mean) / std of a group, with the population's standard deviation; zeros where all rewards are equal."""
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / len(rewards)
    return [(reward - mean) / variance**0.5 if len(set(rewards)) > 1 else 0.0 for reward in rewards]


def surrogates(
    log_pi: torch.Tensor, response: Response, advantage: float, objective: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an objective maximises at each token [R]; where the ratio is clipped; where the teacher's gap is clamped."""
    old = _old(log_pi, response)
    never = torch.zeros_like(log_pi, dtype=torch.bool)
    if objective.name == "cross_entropy":
        return log_pi, never, never
    if objective.name == "grpo" and objective.ratio == "sequence":  # one ratio and one clip for the whole response
        surrogate, clipped = _ppo((log_pi - old).mean(), advantage, objective)
        return surrogate.expand_as(log_pi), clipped.expand_as(log_pi), never
    if objective.name == "grpo":
        return *_ppo(log_pi - old, advantage, objective), never
    gap = log_pi - torch.tensor(response.teacher, dtype=torch.float64)
    if objective.name == "on_policy_kl":
        return torch.exp(log_pi - old) * -gap.detach(), never, never
    if objective.name == "kdrl":
        # A sampled token's part in the gradient of the reverse KL is gap * grad log pi_S, that of gap^2 / 2.
        surrogate, clipped = _ppo(log_pi - old, advantage, objective)
        return surrogate - objective.kl_coefficient * gap**2 / 2, clipped, never
    c = objective.teacher_clamp
    if objective.name == "distilled_rl":
        log_rho = torch.tensor(response.teacher, dtype=torch.float64) - old
        rho = torch.exp(log_rho).clamp(math.exp(-c), math.exp(c))
        w = rho / torch.exp(rho.log().mean()) if advantage > 0 else torch.ones_like(rho)
        surrogate, clipped = _ppo(log_pi - old, advantage, objective)
        return w * surrogate, clipped, log_rho.abs() > c
    assert objective.name == "trrd"
    log_ratio = objective.alpha * (log_pi - old) + (1 - objective.alpha) * torch.clamp(gap, -c, c)
    return *_ppo(log_ratio, advantage, objective), gap.abs() > c


def _ppo(log_ratio: torch.Tensor, advantage: float, objective: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """min(r A, clip(r) A), and where the clip cuts the gradient off."""
    ratio = torch.exp(log_ratio)
    low, high = 1 - objective.eps_low, 1 + objective.eps_high
    cut = (ratio > high) if advantage > 0 else (ratio < low)
    return torch.where(cut, (high if advantage > 0 else low) * advantage, ratio * advantage), cut


def mismatch(log_pi: torch.Tensor, response: Response, objective: Any) -> torch.Tensor:
    """The factor [R] that corrects for a sampler which is not quite pi_old."""
    if objective.mismatch_correction == "none":
        return torch.ones_like(log_pi)
    cap = objective.mismatch_cap
    ratio = torch.exp(_old(log_pi, response) - torch.tensor(response.sampler, dtype=torch.float64))
    if objective.mismatch_correction == "truncated_is":
        return torch.clamp(ratio, max=cap)
    assert objective.mismatch_correction == "icepop"
    return torch.where((ratio < 1 / cap) | (ratio > cap), 0.0, ratio)


def _old(log_pi: torch.Tensor, response: Response) -> torch.Tensor:
    return log_pi.detach() if response.old is None else torch.tensor(response.old, dtype=torch.float64)
