"""Log-probs and entropy of given logits over a vocabulary sharded over a tensor-parallel group (docs/method.md).

Shape letters: T positions, V' columns of this rank's shard of the padded vocabulary.
Rank r of the group holds columns [r * V', (r + 1) * V'). Columns at or beyond `vocab_size` are padding that Megatron
adds to reach a multiple of 128 * TP. They are masked out of max, sum and gradient, so results are the same for every TP
and equal those of engines that do not pad. The arithmetic is float32 for any dtype of the logits.
This is the oracle of the fused loss (parallel/fused_linear_loss.py), which never holds all logits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

_ROWS = 64  # for which the entropy takes more memory at a time


def vocab_parallel_log_probs(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log softmax(logits / temperature) at each position's target, over the unpadded vocabulary.

    Args:
        logits_TV: [T, V'] bf16, fp16 or fp32; this rank's shard. Left unmodified.
        target_T: int64 [T], the same on all ranks of the group, each in [0, vocab_size).
        vocab_size: real columns over the whole group.
        group: the tensor-parallel group; None is one process.
        temperature: divides the logits; above 0.

    Returns:
        float32 [T] in nats, the same on all ranks. Differentiable once in `logits_TV`: every rank gets the gradient
        of its own columns (logits' dtype, exactly 0 in padded columns) without communication, provided that all ranks
        pass the same upstream gradient.

    Raises:
        ValueError naming the argument. On GPUs targets are not checked, because the host would have to wait; a target
        out of range gives NaN there.

    Memory: one float32 [T, V'] tensor, which backward overwrites with the gradient. A second backward through the same
    result therefore raises torch's error for modified saved tensors.
    """
    _check(logits_TV, target_T, vocab_size, group, temperature)
    return _VocabParallelLogProbs.apply(logits_TV, target_T, vocab_size, group, temperature, False)[0]


def vocab_parallel_log_probs_and_entropy(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`vocab_parallel_log_probs`, and the entropy of each whole distribution, float32 [T] in nats.

    Both are differentiable: d entropy / d logit_v = -p_v * (log p_v + entropy) / temperature.
    """
    _check(logits_TV, target_T, vocab_size, group, temperature)
    return _VocabParallelLogProbs.apply(logits_TV, target_T, vocab_size, group, temperature, True)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, target_T, vocab_size, group, temperature, entropy):
        softmax_TV, num_real = _shifted_logits(logits_TV, vocab_size, group, temperature)
        real_TV = softmax_TV[:, :num_real]

        local_T = target_T - _rank(group) * logits_TV.shape[1]
        here_T = (local_T >= 0) & (local_T < num_real)
        local_T = local_T.clamp(0, max(num_real - 1, 0))  # any column, if the target is on another rank
        if num_real > 0:
            target_logit_T = real_TV.gather(1, local_T[:, None])[:, 0].where(here_T, 0.0)
        else:
            target_logit_T = torch.zeros_like(target_T, dtype=torch.float32)

        real_TV.exp_()
        sums = [target_logit_T, real_TV.sum(dim=-1)]
        if entropy:  # x * exp(x), where 0 stands for a probability that underflows
            sums.append(torch.cat([torch.special.xlogy(rows, rows).sum(dim=-1) for rows in real_TV.split(_ROWS)]))
        sums_3T = _all_reduce(torch.stack(sums), group)
        log_probs_T = sums_3T[0] - sums_3T[1].log()
        log_probs_T.masked_fill_((target_T < 0) | (target_T >= vocab_size), float("nan"))
        entropy_T = sums_3T[1].log() - sums_3T[2] / sums_3T[1] if entropy else None

        if ctx.needs_input_grad[0]:
            real_TV.div_(sums_3T[1][:, None])
            ctx.save_for_backward(softmax_TV, local_T, here_T, entropy_T)
            ctx.num_real, ctx.temperature, ctx.dtype = num_real, temperature, logits_TV.dtype
            ctx.set_materialize_grads(False)
        return log_probs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, entropy_grad_T):
        softmax_TV, local_T, here_T, entropy_T = ctx.saved_tensors
        if ctx.num_real > 0:
            # d log p(target) / d logit_v = (1[v = target] - p_v) / temperature. Padded columns already hold 0 and stay
            # untouched, so they are 0 even if the upstream gradient is not finite.
            scaled_T = softmax_TV.new_zeros(local_T.shape) if grad_T is None else grad_T / ctx.temperature
            real_TV = softmax_TV[:, : ctx.num_real]
            if entropy_grad_T is None:
                real_TV.mul_(-scaled_T[:, None])
            else:
                of_entropy_T = entropy_grad_T / ctx.temperature
                for start in range(0, real_TV.shape[0], _ROWS):
                    part = slice(start, start + _ROWS)
                    p, of_entropy = real_TV[part], of_entropy_T[part, None]
                    of_p = scaled_T[part, None] + of_entropy * entropy_T[part, None]
                    real_TV[part] = -of_p * p - of_entropy * torch.special.xlogy(p, p)
            softmax_TV.scatter_add_(1, local_T[:, None], scaled_T.where(here_T, 0.0)[:, None])
        return softmax_TV.to(ctx.dtype), None, None, None, None, None


def _shifted_logits(logits_TV, vocab_size, group, temperature) -> tuple[torch.Tensor, int]:
    """(logits - max over the group) / temperature in float32 [T, V'], 0 in padded columns; number of real columns.

    Subtracts before dividing: differences of close logits are exact in float32.
    """
    T, width = logits_TV.shape
    num_real = min(max(vocab_size - _rank(group) * width, 0), width)
    if num_real > 0:
        max_T = logits_TV[:, :num_real].amax(dim=-1).float()
    else:
        # Only padding here. -inf is the neutral element of max and never enters a subtraction, because rank 0 always
        # has a real column.
        max_T = torch.full((T,), float("-inf"), device=logits_TV.device)
    max_T = _all_reduce(max_T, group, dist.ReduceOp.MAX)
    shifted_TV = torch.empty(T, width, dtype=torch.float32, device=logits_TV.device)
    shifted_TV[:, :num_real] = logits_TV[:, :num_real]
    shifted_TV[:, num_real:] = 0.0
    real_TV = shifted_TV[:, :num_real].sub_(max_T[:, None])
    if temperature != 1.0:
        real_TV.div_(temperature)
    return shifted_TV, num_real


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None, op=dist.ReduceOp.SUM) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _check(logits_TV, target_T, vocab_size, group, temperature) -> None:
    if logits_TV.dim() != 2 or not logits_TV.is_floating_point():
        shape = tuple(logits_TV.shape)
        raise ValueError(f"logits_TV must be a floating-point [T, V'] tensor, got {logits_TV.dtype} of shape {shape}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    ranks = 1 if group is None else dist.get_world_size(group)
    if not 1 <= vocab_size <= logits_TV.shape[1] * ranks:
        raise ValueError(
            f"vocab_size {vocab_size} must be in [1, {logits_TV.shape[1] * ranks}]: "
            f"{ranks} shards of {logits_TV.shape[1]} columns"
        )
    if target_T.dtype != torch.int64 or target_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"target_T must be int64 of shape [{logits_TV.shape[0]}], got {target_T.dtype} of {tuple(target_T.shape)}"
        )
    if target_T.device.type == "cpu" and target_T.numel() > 0:
        low, high = target_T.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"target_T must be in [0, {vocab_size}), got values from {low} to {high}")
