"""Log-probs, loss and gradients straight from hidden states, without ever holding the logits of all tokens.

The gradient of a per-token loss needs only the token's log-prob and entropy. So one pass over chunks of tokens computes
the chunk's logits, their softmax statistics, the log-probs, the loss and its derivative, overwrites the logits with
their gradient, and multiplies that with the weight and the hidden states. Three matrix products, no recomputation.

Shape letters: T tokens with loss, C tokens of a chunk, H hidden size, V vocabulary, V' rows of this rank's shard of the
padded vocabulary. Rank r of the group holds rows [r * V', (r + 1) * V'). Rows at or beyond `vocab_size` are padding and
get no logits (docs/method.md, log-prob contract). Logits and their gradient are held in the hidden states' dtype;
arithmetic on them is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from rlad_megatron.kernels import softmax_kernels
from rlad_megatron.kernels.products import add_product_
from rlad_megatron.kernels.softmax_torch import NOT_HERE
from rlad_megatron.parallel import softmax_stats
from rlad_megatron.parallel.linear_head import LinearHead, check_inputs
from rlad_megatron.parallel.loss_memory import chunks_of

TokenStats = dict[str, torch.Tensor]
# token_loss(log_probs_C and entropy_C with gradient, their slice of the T tokens) -> (loss of each token [C], detached
# stats [C])
TokenLoss = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, TokenStats]]


def fused_linear_loss(
    hidden_TH: torch.Tensor,
    target_T: torch.Tensor,
    head: LinearHead,
    token_loss: TokenLoss,
    *,
    main_grad_VH: torch.Tensor | None = None,
    gradient_scale: float = 1.0,
    reduce_hidden_grad: bool = True,
) -> tuple[torch.Tensor, TokenStats]:
    """Sum over tokens of `token_loss`, differentiable in `hidden_TH` and in the head's weight.

    The forward pass already forms the gradients that are required; backward only returns them.

    Args:
        hidden_TH: [T, H], the same on all ranks of the group; only tokens that carry loss.
        target_T: int64 [T], the same on all ranks, each in [0, vocab_size).
        head: the output layer.
        token_loss: any function of log-probs, and of the distributions' entropies, in which tokens are independent, the
            same on all ranks. Autograd differentiates it on [C] tensors, so an objective needs neither a kernel nor a
            derivative.
        main_grad_VH: float32 [V', H] buffer. The weight's gradient is added to it, during the forward pass, instead of
            being returned to autograd.
        gradient_scale: the upstream gradient that backward will get (the loss scale of fp16 training). Gradients in
            half precision and in `main_grad_VH` are formed with it.
        reduce_hidden_grad: sum the gradient of `hidden_TH` over the group. False under sequence parallelism, where
            the backward of gathering the hidden states does it, with a reduce-scatter.

    Returns:
        loss: float32 scalar, the same on all ranks. Exactly 0 without tokens.
        stats: those of `token_loss`, each [T]; `log_probs` and, of each whole distribution, `entropy`, float32 [T] in
            nats; all detached.

    Raises:
        ValueError naming the argument: wrong shapes or dtypes, a shard that does not match the padded vocabulary, or,
        on CPUs, a target out of range. On GPUs such a target makes the loss NaN. NaN in the hidden states makes the
        loss NaN on all ranks of the group, and no rank waits for another.

    Memory, besides the gradients of hidden states and weight (float32 [V', H] without `main_grad_VH`): see
    parallel/loss_memory.py.
    """
    check_inputs(hidden_TH, target_T, head)
    if main_grad_VH is not None and (main_grad_VH.dtype, main_grad_VH.shape) != (torch.float32, head.weight_VH.shape):
        raise ValueError(
            f"main_grad_VH must be float32 {tuple(head.weight_VH.shape)}, "
            f"got {main_grad_VH.dtype} {tuple(main_grad_VH.shape)}"
        )
    stats: TokenStats = {}
    gradients = None
    if torch.is_grad_enabled() and (hidden_TH.requires_grad or head.weight_VH.requires_grad):
        gradients = _Gradients(hidden_TH, head, main_grad_VH, gradient_scale, reduce_hidden_grad)
    loss = _FusedLinearLoss.apply(hidden_TH, head.weight_VH, target_T, head, token_loss, stats, gradients)
    return loss, stats


@torch.no_grad()
def fused_linear_log_probs(
    hidden_TH: torch.Tensor,
    target_T: torch.Tensor,
    head: LinearHead,
    *,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax(hidden @ weight^T / temperature) at each token's target, without gradient.

    Arguments and errors as in `fused_linear_loss`. Returns float32 [T] log-probs in nats and, with `entropy`, the
    entropy of each distribution, float32 [T] in nats; otherwise None.
    """
    check_inputs(hidden_TH, target_T, head)
    own_4T = torch.cat([chunk.stats_4C for chunk in _chunks(hidden_TH, target_T, head, entropy=entropy)], dim=1)
    stats_4T = softmax_stats.over_ranks(own_4T, head)
    log_probs_T = softmax_stats.log_probs(stats_4T, head.temperature)
    return log_probs_T, softmax_stats.entropy(stats_4T) if entropy else None


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, target_T, head, token_loss, stats, gradients):
        losses, parts, log_probs, entropies = [], [], [], []
        for chunk in _chunks(hidden_TH, target_T, head, entropy=True):
            stats_4C = softmax_stats.over_ranks(chunk.stats_4C, head)
            log_probs_C = softmax_stats.log_probs(stats_4C, head.temperature)
            entropy_C = softmax_stats.entropy(stats_4C)
            log_probs.append(log_probs_C)
            entropies.append(entropy_C)
            with torch.set_grad_enabled(gradients is not None):
                leaves = [value.detach().requires_grad_(gradients is not None) for value in (log_probs_C, entropy_C)]
                loss_C, part = token_loss(*leaves, chunk.tokens)
                total = loss_C.sum()
            losses.append(loss_C.detach())
            parts.append(part)
            if gradients is not None:
                derivatives = torch.autograd.grad(total, leaves, allow_unused=True)
                gradients.add(chunk, stats_4C, log_probs_C, *derivatives)
        for name in parts[0]:
            stats[name] = torch.cat([part[name] for part in parts])
        stats["log_probs"], stats["entropy"] = torch.cat(log_probs), torch.cat(entropies)
        if gradients is not None:
            ctx.gradient_scale, ctx.weight_dtype = gradients.scale, weight_VH.dtype
            ctx.in_main_grad = gradients.in_main_grad
            ctx.save_for_backward(gradients.finish(), None if gradients.in_main_grad else gradients.weight_VH)
        # One sum over all tokens: its order does not depend on the chunks.
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden_TH, weight_VH = ctx.saved_tensors
        factor = upstream / ctx.gradient_scale
        # Reading the value on a GPU would make the host wait.
        if factor.device.type == "cuda" or factor != 1:
            if ctx.in_main_grad:
                if factor.device.type == "cpu":
                    raise RuntimeError(f"main_grad_VH was formed for another upstream gradient than {upstream.item()}")
                # The addition to main_grad_VH cannot be undone. NaN is noticed; a wrong gradient is not.
                factor = factor.where(factor == 1, float("nan"))
            for gradient in (hidden_TH, weight_VH):
                if gradient is not None:
                    gradient.mul_(factor)
        return hidden_TH, None if weight_VH is None else weight_VH.to(ctx.weight_dtype), None, None, None, None, None


class _Gradients:
    """The gradients of hidden states and weight, accumulated chunk by chunk."""

    def __init__(self, hidden_TH, head: LinearHead, main_grad_VH, scale: float, reduce_hidden: bool) -> None:
        self.head, self.scale = head, scale
        self.hidden_TH = torch.empty_like(hidden_TH, requires_grad=False) if hidden_TH.requires_grad else None
        self.in_main_grad = head.weight_VH.requires_grad and main_grad_VH is not None
        self.weight_VH = main_grad_VH if self.in_main_grad else None
        if head.weight_VH.requires_grad and main_grad_VH is None:
            self.weight_VH = torch.zeros_like(head.weight_VH, dtype=torch.float32, requires_grad=False)
        self.reduce_hidden = reduce_hidden and head.ranks > 1
        self._pending: list[dist.Work] = []

    def add(self, chunk: _Chunk, stats_4C, log_probs_C, derivative_C, entropy_derivative_C) -> None:
        """Add the gradients of a chunk, given its loss's derivatives by log-prob and entropy. Overwrites its logits."""
        head = self.head
        log_shift_C = (chunk.stats_4C[0] - stats_4C[0]) / head.temperature
        part_C = log_shift_C.exp() / stats_4C[1]  # p_v = part * exp(x_v), with x_v relative to this rank's maximum
        # d log p(target) / d logit_v = (1[v = target] - p_v) / temperature
        scaled_C = 0.0 if derivative_C is None else derivative_C * (self.scale / head.temperature)
        factor_C, target_C, log_factor_C = -scaled_C * part_C, -scaled_C * torch.expm1(log_probs_C), None
        if entropy_derivative_C is not None:
            # d entropy / d logit_v = -p_v * (log p_v + entropy) / temperature
            scaled_C, entropy_C = (
                entropy_derivative_C * (self.scale / head.temperature),
                softmax_stats.entropy(stats_4C),
            )
            log_factor_C = -scaled_C * part_C
            factor_C = factor_C + log_factor_C * (log_shift_C - stats_4C[1].log() + entropy_C)
            target_C = target_C - scaled_C * log_probs_C.exp() * (log_probs_C + entropy_C)
        softmax_kernels(chunk.logits_CV.device).gradient_(
            chunk.logits_CV, chunk.stats_4C, chunk.place_C, factor_C, target_C, head.temperature, log_factor_C
        )
        if self.hidden_TH is not None:
            part_CH = self.hidden_TH[chunk.tokens]
            add_product_(part_CH, chunk.logits_CV, head.weight_VH[: head.num_real], beta=0)
            if self.reduce_hidden and part_CH.numel():  # overlaps with the weight's product
                self._pending.append(dist.all_reduce(part_CH, group=head.group, async_op=True))
        if self.weight_VH is not None:
            add_product_(self.weight_VH[: head.num_real], chunk.logits_CV.t(), chunk.hidden_CH)

    def finish(self) -> torch.Tensor | None:
        """Wait for the reductions; returns the gradient of the hidden states, if they require one."""
        for work in self._pending:
            work.wait()
        return self.hidden_TH


@dataclass
class _Chunk:
    """A chunk's logits over this rank's real columns, and their statistics."""

    tokens: slice
    hidden_CH: torch.Tensor
    logits_CV: torch.Tensor  # as left by `row_stats_`; all chunks share the memory
    place_C: torch.Tensor  # int64, the target's column, or NOT_HERE
    stats_4C: torch.Tensor  # of each row over this rank's columns (kernels/softmax_torch.py)


def _chunks(hidden_TH: torch.Tensor, target_T: torch.Tensor, head: LinearHead, *, entropy: bool) -> Iterator[_Chunk]:
    weight_VH, hidden_TH = head.weight_VH.detach()[: head.num_real], hidden_TH.detach()
    row_stats_ = softmax_kernels(hidden_TH.device).row_stats_
    local_T = target_T - head.rank * head.weight_VH.shape[0]
    place_T = local_T.where((local_T >= 0) & (local_T < head.num_real), NOT_HERE)
    valid_T = (target_T >= 0) & (target_T < head.vocab_size)
    chunks = chunks_of(target_T.shape[0], head.chunk_tokens)  # the first is the largest
    # Rows start at multiples of 128 elements, which makes GPUs multiply faster. The columns in between are zeroed: on
    # CPUs with AMX, oneDNN's half-precision products read beyond a row's end, and garbage there may be NaN.
    buffer_CV = hidden_TH.new_zeros(chunks[0].stop, head.weight_VH.shape[0])[:, : head.num_real]
    for tokens in chunks:
        hidden_CH, place_C = hidden_TH[tokens], place_T[tokens]
        logits_CV = buffer_CV[: hidden_CH.shape[0]]
        add_product_(logits_CV, hidden_CH, weight_VH.t(), beta=0)
        stats_4C = row_stats_(logits_CV, place_C, head.temperature, entropy=entropy)
        # A target on no rank would give -inf, which a loss could turn into a finite value.
        stats_4C[2].masked_fill_(~valid_T[tokens], float("nan"))
        yield _Chunk(tokens, hidden_CH, logits_CV, place_C, stats_4C)
