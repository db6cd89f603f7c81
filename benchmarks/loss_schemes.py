"""Other schemes from hidden states to log-probs, written from their published descriptions, for benchmarks/loss.py.

Each takes the hidden states and this rank's rows of the head, and returns float32 [T] log-probs, differentiable in
both. Shape letters as in rlad_megatron/parallel/fused_linear_loss.py. Hidden states are replicated over the group. The
caller leaves out rows of padding, except for Megatron-Core's cross-entropy, which needs equally many on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Shard:
    """Rows [start, start + n) of the head, those of this rank of the group."""

    weight_VH: torch.Tensor
    start: int
    group: dist.ProcessGroup


class _SumOverGroup(torch.autograd.Function):
    """Identity whose gradient is summed over the group, for replicated hidden states before a sharded head."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        return _sum(grad.contiguous(), ctx.group), None


def _sum(tensor: torch.Tensor, group, op=dist.ReduceOp.SUM) -> torch.Tensor:
    dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _log_softmax(logits_TV: torch.Tensor, group) -> torch.Tensor:
    """float32 [T, V'] log-probs over all shards, in three tensors of that size."""
    shifted = logits_TV - _sum(logits_TV.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
    return shifted - _sum(shifted.exp().sum(-1, keepdim=True), group).log()


def _local(target_T: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target in the shard, or 0 if it is on another rank; whether it is in the shard."""
    local = target_T - shard.start
    here = (local >= 0) & (local < shard.weight_VH.shape[0])
    return local.where(here, 0), here


def _pick(log_probs_TV: torch.Tensor, local: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    return log_probs_TV.gather(1, local[:, None])[:, 0].where(here, 0.0)


class _FullLogSoftmax(torch.autograd.Function):
    """Upcast all logits to float32, keep the log-softmax, one-hot in backward."""

    @staticmethod
    def forward(ctx, logits_TV, target_T, shard):
        log_softmax = _log_softmax(logits_TV.float(), shard.group)
        local, here = _local(target_T, shard)
        ctx.save_for_backward(log_softmax, local, here)
        ctx.dtype = logits_TV.dtype
        return _sum(_pick(log_softmax, local, here), shard.group)

    @staticmethod
    def backward(ctx, grad_T):
        log_softmax, local, here = ctx.saved_tensors
        one_hot = torch.zeros_like(log_softmax).scatter_(1, local[:, None], here.float()[:, None])
        return ((one_hot - log_softmax.exp()) * grad_T[:, None]).to(ctx.dtype), None, None


def full_float32(hidden_TH, shard: Shard, target_T) -> torch.Tensor:
    """Log-probs by a log-softmax over all logits in float32."""
    logits_TV = _SumOverGroup.apply(hidden_TH, shard.group) @ shard.weight_VH.t()
    return _FullLogSoftmax.apply(logits_TV, target_T, shard)


class _ChunkedRecompute(torch.autograd.Function):
    """The steps of NeMo-RL's linear cross-entropy fusion (ChunkedDistributedHiddenStatesToLogprobs).

    For each chunk of tokens it computes logits in the model's dtype and their float32 log-softmax, and repeats both in
    backward. There it adds an int64 one-hot, a float32 copy of the head for each chunk, and a weight gradient that is
    computed as [H, V'], transposed and summed in the weight's dtype.
    """

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, target_T, shard, chunk):
        local, here = _local(target_T, shard)
        parts = [
            _pick(_log_softmax((hidden @ weight_VH.t()).float(), shard.group), *place)
            for hidden, *place in zip(*(tensor.split(chunk) for tensor in (hidden_TH, local, here)), strict=True)
        ]
        ctx.save_for_backward(hidden_TH, weight_VH, local, here)
        ctx.group, ctx.chunk = shard.group, chunk
        return _sum(torch.cat(parts), shard.group)

    @staticmethod
    def backward(ctx, grad_T):
        hidden_TH, weight_VH, local_T, here_T = ctx.saved_tensors
        grad_hidden, grad_weight = [], torch.zeros_like(weight_VH)
        split = (tensor.split(ctx.chunk) for tensor in (hidden_TH, local_T, here_T, grad_T))
        for hidden, local, here, grad in zip(*split, strict=True):
            softmax = _log_softmax((hidden @ weight_VH.t()).float(), ctx.group).exp()
            one_hot = here[:, None] * torch.nn.functional.one_hot(local, weight_VH.shape[0])
            grad_logits = one_hot.float().sub_(softmax).mul_(grad[:, None])
            grad_hidden.append(grad_logits @ weight_VH.float())
            grad_weight.add_((hidden.float().t() @ grad_logits).t().contiguous())
        total = _sum(torch.cat(grad_hidden), ctx.group)
        return total.to(hidden_TH.dtype), grad_weight, None, None, None


def chunked_recompute(hidden_TH, shard: Shard, target_T, chunk: int) -> torch.Tensor:
    """Log-probs chunk by chunk, with the logits recomputed in backward."""
    return _ChunkedRecompute.apply(hidden_TH, shard.weight_VH, target_T, shard, chunk)


def megatron_cross_entropy(hidden_TH, weight_VH, target_T, group) -> torch.Tensor:
    """Log-probs by Megatron-Core's fused vocabulary-parallel cross-entropy over all logits, padding included.

    Its gradient is rounded to bf16 for any dtype of the logits.
    """
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    logits_TV = _SumOverGroup.apply(hidden_TH, group) @ weight_VH.t()
    return -fused_vocab_parallel_cross_entropy(logits_TV[:, None], target_T[:, None], group)[:, 0]


def materialising(hidden_TH, weight_VH, target_T, group, vocab_size: int) -> torch.Tensor:
    """Log-probs by our own oracle, parallel/vocab_logprobs.py."""
    from rlad_megatron.parallel.vocab_logprobs import vocab_parallel_log_probs

    logits_TV = _SumOverGroup.apply(hidden_TH, group) @ weight_VH.t()
    return vocab_parallel_log_probs(logits_TV, target_T, vocab_size=vocab_size, group=group)
