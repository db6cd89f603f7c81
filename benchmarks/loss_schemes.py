"""Other ways from hidden states to log-probs, written from their published descriptions, for benchmarks/loss.py.

Each takes the same tensors and returns float32 [T] log-probs, differentiable in `hidden_TH` and `weight_VH`. Shape
letters as in rlad_megatron/parallel/fused_linear_loss.py. They compute over the padded vocabulary as their models do;
the benchmark uses a vocabulary without padding, so all compute the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class _SumOverGroup(torch.autograd.Function):
    """Identity whose gradient is summed over the group: where replicated hidden states meet a sharded head."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        return _sum(grad.contiguous(), ctx.group), None


def _sum(tensor: torch.Tensor, group, op=dist.ReduceOp.SUM) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _log_softmax(logits_TV: torch.Tensor, group) -> torch.Tensor:
    """float32 [T, V'] log-probs over all shards."""
    shifted = logits_TV.float()
    shifted = shifted - _sum(shifted.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
    return shifted - _sum(shifted.exp().sum(-1, keepdim=True), group).log()


def _at_target(values_TV: torch.Tensor, target_T: torch.Tensor, group) -> torch.Tensor:
    local, here = _local(target_T, values_TV.shape[1], group)
    picked = values_TV.gather(1, local[:, None])[:, 0]
    return _sum(picked.where(here, 0.0), group)


def _local(target_T: torch.Tensor, width: int, group) -> tuple[torch.Tensor, torch.Tensor]:
    local = target_T - (0 if group is None else dist.get_rank(group)) * width
    here = (local >= 0) & (local < width)
    return local.where(here, 0), here


class _FullLogSoftmax(torch.autograd.Function):
    """Upcast all logits to float32, keep the log-softmax, one-hot in backward."""

    @staticmethod
    def forward(ctx, logits_TV, target_T, group):
        log_softmax = _log_softmax(logits_TV, group)
        ctx.save_for_backward(log_softmax, target_T)
        ctx.group, ctx.dtype = group, logits_TV.dtype
        return _at_target(log_softmax, target_T, group)

    @staticmethod
    def backward(ctx, grad_T):
        log_softmax, target_T = ctx.saved_tensors
        local, here = _local(target_T, log_softmax.shape[1], ctx.group)
        one_hot = torch.zeros_like(log_softmax).scatter_(1, local[:, None], here.float()[:, None])
        return ((one_hot - log_softmax.exp()) * grad_T[:, None]).to(ctx.dtype), None, None


def full_float32(hidden_TH, weight_VH, target_T, group) -> torch.Tensor:
    """Log-probs by a log-softmax over all logits in float32."""
    logits_TV = _SumOverGroup.apply(hidden_TH, group) @ weight_VH.t()
    return _FullLogSoftmax.apply(logits_TV, target_T, group)


class _ChunkedRecompute(torch.autograd.Function):
    """Chunks of tokens; the head in float32; logits computed again in backward; int64 one-hot."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, target_T, group, chunk):
        weight = weight_VH.float()
        log_probs = [
            _at_target(_log_softmax(hidden.float() @ weight.t(), group), target, group)
            for hidden, target in zip(hidden_TH.split(chunk), target_T.split(chunk), strict=True)
        ]
        ctx.save_for_backward(hidden_TH, weight_VH, target_T)
        ctx.group, ctx.chunk = group, chunk
        return torch.cat(log_probs)

    @staticmethod
    def backward(ctx, grad_T):
        hidden_TH, weight_VH, target_T = ctx.saved_tensors
        weight = weight_VH.float()
        grad_hidden, grad_weight = [], torch.zeros_like(weight)
        parts = (tensor.split(ctx.chunk) for tensor in (hidden_TH, target_T, grad_T))
        for hidden, target, grad in zip(*parts, strict=True):
            softmax = _log_softmax(hidden.float() @ weight.t(), ctx.group).exp()
            local, here = _local(target, weight.shape[0], ctx.group)
            one_hot = torch.nn.functional.one_hot(local, weight.shape[0]) * here[:, None]
            grad_logits = (one_hot - softmax) * grad[:, None]
            grad_hidden.append(_sum(grad_logits @ weight, ctx.group))
            grad_weight += grad_logits.t() @ hidden.float()
        return torch.cat(grad_hidden).to(hidden_TH.dtype), grad_weight.to(weight_VH.dtype), None, None, None


def chunked_recompute(hidden_TH, weight_VH, target_T, group, chunk: int) -> torch.Tensor:
    """Log-probs chunk by chunk, with the logits recomputed in backward."""
    return _ChunkedRecompute.apply(hidden_TH, weight_VH, target_T, group, chunk)


def megatron_cross_entropy(hidden_TH, weight_VH, target_T, group) -> torch.Tensor:
    """Log-probs by Megatron-Core's fused vocabulary-parallel cross-entropy over all logits.

    Its gradient is rounded to bf16 whatever the logits' dtype.
    """
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    logits_TV = _SumOverGroup.apply(hidden_TH, group) @ weight_VH.t()
    return -fused_vocab_parallel_cross_entropy(logits_TV[:, None], target_T[:, None], group)[:, 0]


def materialising(hidden_TH, weight_VH, target_T, group) -> torch.Tensor:
    """Log-probs by our own oracle, parallel/vocab_logprobs.py."""
    from rlad_megatron.parallel.vocab_logprobs import vocab_parallel_log_probs

    logits_TV = _SumOverGroup.apply(hidden_TH, group) @ weight_VH.t()
    vocab_size = weight_VH.shape[0] * (1 if group is None else dist.get_world_size(group))
    return vocab_parallel_log_probs(logits_TV, target_T, vocab_size=vocab_size, group=group)
