"""The output layer on the last pipeline stage: from hidden states to log-probs and losses.

Shape letters: N positions with loss, H hidden size, V' columns of this rank's vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

from rlad_megatron.config import LossConfig
from rlad_megatron.models.build import HiddenStatesModel
from rlad_megatron.parallel.fused_linear_loss import TokenLoss, TokenStats, fused_linear_log_probs, fused_linear_loss
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.parallel.linear_head import LinearHead
from rlad_megatron.parallel.loss_memory import pick_chunk_tokens
from rlad_megatron.parallel.vocab_logprobs import vocab_parallel_log_probs, vocab_parallel_log_probs_and_entropy


@dataclass(frozen=True)
class Head:
    """The output layer of `gpt`, with the temperature and vocabulary of a run.

    Hidden states are [N, H], the same on every tensor-parallel rank. `config.fused` chooses the chunked pass; otherwise
    the logits of all positions are computed, as its oracle.
    """

    gpt: HiddenStatesModel
    groups: ModelGroups
    vocab_size: int
    temperature: float
    config: LossConfig

    def log_probs(self, hidden_NH: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """float32 [N] in nats, without gradient."""
        with torch.no_grad():
            if self.config.fused:
                return fused_linear_log_probs(hidden_NH, target_N, self._linear())[0]
            logits_NV = self._logits(hidden_NH)
            return vocab_parallel_log_probs(logits_NV, target_N, **self._vocabulary())

    def loss(
        self,
        hidden_NH: torch.Tensor,
        target_N: torch.Tensor,
        token_loss: TokenLoss,
        *,
        gradient_scale: float = 1.0,
    ) -> tuple[torch.Tensor, TokenStats]:
        """The sum of `token_loss` over positions, and per-position stats (parallel/fused_linear_loss.py).

        gradient_scale: the factor applied to the loss before backward.
        """
        if self.config.fused:
            head = self._linear()
            # Megatron's DDP gives the weight a gradient buffer; the loss adds to it directly.
            main_grad = getattr(head.weight_VH, "main_grad", None)
            loss, stats = fused_linear_loss(
                hidden_NH,
                target_N,
                head,
                token_loss,
                main_grad_VH=main_grad,
                gradient_scale=gradient_scale,
                reduce_hidden_grad=not self.gpt.config.sequence_parallel,
            )
            # A weight tied to this stage's embedding gets its mark there.
            if main_grad is not None and loss.requires_grad and not getattr(head.weight_VH, "zero_out_wgrad", False):
                loss = _GradientIsInMainGrad.apply(loss, head.weight_VH)
            return loss, stats
        logits_NV = self._logits(hidden_NH)
        log_probs_N, entropy_N = vocab_parallel_log_probs_and_entropy(logits_NV, target_N, **self._vocabulary())
        loss_N, stats = token_loss(log_probs_N, entropy_N, slice(0, log_probs_N.shape[0]))
        return loss_N.sum(), {**stats, "log_probs": log_probs_N.detach(), "entropy": entropy_N.detach()}

    def _linear(self) -> LinearHead:
        weight_VH = self.gpt.head_weight
        chunk = pick_chunk_tokens(self.config.memory_mb, weight_VH.shape[0], weight_VH.element_size())
        return LinearHead(weight_VH, self.vocab_size, self.groups.tp, self.temperature, chunk)

    def _logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        if not self.gpt.config.sequence_parallel:  # under it the gather of the hidden states sums their gradient
            hidden_NH = copy_to_tensor_model_parallel_region(hidden_NH, group=self.groups.tp)
        return torch.nn.functional.linear(hidden_NH, self.gpt.head_weight)

    def _vocabulary(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "group": self.groups.tp, "temperature": self.temperature}


class _GradientIsInMainGrad(torch.autograd.Function):
    """Identity on the loss; backward tells Megatron's DDP that the weight's gradient is in `main_grad`.

    It does what Megatron's own fused layers do: set a mark, and return an unread gradient, because DDP cannot
    overlap its reductions with backward if a parameter gets none.
    """

    @staticmethod
    def forward(ctx, loss: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        ctx.weight_VH = weight_VH
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.weight_VH.grad_added_to_main_grad = True
        return upstream, torch.empty_like(ctx.weight_VH)
