"""The loss of an update, -sum(weight * surrogate) over all its tokens, and the metrics that come with it.

Shape letters: T or N tokens with loss, C of them, H hidden size, V' rows of this rank's shard of the padded vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from rlad_megatron import platform
from rlad_megatron.config import ObjectiveConfig
from rlad_megatron.objectives.diagnostics import teacher_shares
from rlad_megatron.objectives.mismatch import histogram_quantile, mismatch_stats, mismatch_weights
from rlad_megatron.objectives.reference_kl import k3
from rlad_megatron.objectives.registry import STAT_METRICS, surrogate_for
from rlad_megatron.parallel.fused_linear_loss import TokenLoss, TokenStats, fused_linear_loss
from rlad_megatron.parallel.linear_head import LinearHead
from rlad_megatron.types import TokenBatch

# What one micro-batch adds, by metric with a prefix for how it combines: sum/ and max/ of scalars, mean/ for a sum over
# tokens, p99/ for a histogram of them (objectives/mismatch.py), share/ for two sums, the first over the second.
Report = dict[str, torch.Tensor]


def token_loss(per_token: TokenBatch, config: ObjectiveConfig, entropy_weight: float = 0.0) -> TokenLoss:
    """The loss of each token under the configured objective, its KL to the reference and its mismatch correction.

    entropy_weight: of the bonus (objectives/entropy.py).
    """
    surrogate = surrogate_for(config.name)

    def loss(log_probs_C: torch.Tensor, entropy_C: torch.Tensor, tokens: slice) -> tuple[torch.Tensor, TokenStats]:
        batch = per_token[tokens].with_old(log_probs_C)
        of_surrogate = batch.with_sequence_ratio(log_probs_C) if config.ratio == "sequence" else batch
        surrogate_C, stats = surrogate(log_probs_C, of_surrogate, config)
        assert batch.reference_log_probs is not None or not config.reference_kl
        if batch.reference_log_probs is not None:
            kl_C = k3(log_probs_C, batch.reference_log_probs)
            stats = stats | {"reference_kl": kl_C.detach()}
            if config.reference_kl:  # otherwise it is only measured
                surrogate_C = surrogate_C - config.reference_kl * kl_C
        if entropy_weight:
            surrogate_C = surrogate_C + entropy_weight * entropy_C
        weight_C = batch.weight
        if batch.sampler_log_probs is not None:
            weight_C = weight_C * mismatch_weights(
                batch.old_log_probs,
                batch.sampler_log_probs,
                correction=config.mismatch_correction,
                cap=config.mismatch_cap,
            )
        return -weight_C * surrogate_C, stats

    return loss


def loss_report(loss: torch.Tensor, stats: TokenStats, per_token: TokenBatch, config: ObjectiveConfig) -> Report:
    """What a micro-batch adds to the metrics. `stats`: those of `token_loss`, `log_probs` and `entropy` [N]."""
    report = {"sum/loss/policy": loss.detach().clone(), "sum/tokens/train": loss.new_full((), per_token.weight.numel())}
    if per_token.sampler_log_probs is not None:
        old_N = per_token.with_old(stats["log_probs"]).old_log_probs
        gap_sum, gap_max, histogram = mismatch_stats(old_N, per_token.sampler_log_probs)
        report |= {"mean/mismatch/abs_mean": gap_sum, "max/mismatch/abs_max": gap_max}
        report |= {"p99/mismatch/abs_p99": histogram}
    report |= {f"share/{name}": sums for name, sums in teacher_shares(stats, per_token, config).items()}
    means = {name: value for name, value in stats.items() if name != "log_probs"}
    return report | {f"mean/{STAT_METRICS[name]}": value.float().sum() for name, value in means.items()}


def reduce_reports(reports: list[Report], *, counted: bool) -> dict[str, float]:
    """The metrics over all tokens of the update, the same on every rank. Collective.

    counted: whether this rank's reports count, which is so on one rank of each model copy.
    """
    # Earlier pipeline stages have no reports, but need their sizes to join the reduction. The last rank has some.
    found: list = [{key: reports[0][key].numel() for key in sorted(reports[0])} if reports else None]
    dist.broadcast_object_list(found, src=dist.get_world_size() - 1)
    sizes: dict[str, int] = found[0]
    values = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=platform.device())
    is_max = torch.tensor([key.startswith("max/") for key, size in sizes.items() for _ in range(size)]).to(
        values.device
    )
    if counted:
        table = torch.stack([torch.cat([report[key].double().view(-1) for key in sizes]) for report in reports])
        values = torch.where(is_max, table.amax(0), table.sum(0))
    maxima = values.clone()
    dist.all_reduce(values)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    total = dict(zip(sizes, torch.where(is_max, maxima, values).cpu().split(list(sizes.values())), strict=True))
    tokens = max(total["sum/tokens/train"].item(), 1)
    metrics = {}
    for key, value in total.items():
        kind, name = key.split("/", 1)
        if kind == "p99":
            metrics[name] = histogram_quantile(value, 0.99)
        elif kind == "share":
            if value[1]:  # otherwise the update has no such token
                metrics[name] = (value[0] / value[1]).item()
        else:
            metrics[name] = value.item() / tokens if kind == "mean" else value.item()
    return metrics


def fused_linear_trrd(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    old_T: torch.Tensor,
    teacher_T: torch.Tensor,
    advantage_T: torch.Tensor,
    weight_T: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    teacher_clamp: float = 1.0,
    chunk_tokens: int = 1024,
    main_grad_VH: torch.Tensor | None = None,
) -> tuple[torch.Tensor, TokenStats]:
    """The TRRD loss -sum(weight * min(r * A, clip(r) * A)) (objectives/trrd.py) straight from hidden states.

    Args:
        hidden_TH, weight_VH, target_T, vocab_size, group, temperature, chunk_tokens, main_grad_VH: as in
            `fused_linear_loss` and `LinearHead`. Differentiable in hidden_TH and weight_VH.
        old_T, teacher_T: float32 [T], log pi_old and log pi_T in nats.
        advantage_T, weight_T: float32 [T].
        alpha, eps_low, eps_high, teacher_clamp: as in `trrd`.

    Returns:
        loss and stats as `fused_linear_loss`; the stats are `log_probs` and those of `trrd`.

    Raises:
        ValueError as `fused_linear_loss`; also for per-token tensors of another shape and, on CPUs, for old or teacher
        log-probs that are not finite.
    """
    per_token = {"old_T": old_T, "teacher_T": teacher_T, "advantage_T": advantage_T, "weight_T": weight_T}
    for name, value in per_token.items():
        if value.shape != target_T.shape:
            raise ValueError(f"{name} must have shape {tuple(target_T.shape)} as target_T, got {tuple(value.shape)}")
        if name in ("old_T", "teacher_T") and value.device.type == "cpu" and not torch.isfinite(value).all():
            raise ValueError(f"{name} must be finite; the log-prob of a sampled token is never -inf or NaN")

    config = ObjectiveConfig(name="trrd", alpha=alpha, eps_low=eps_low, eps_high=eps_high, teacher_clamp=teacher_clamp)
    batch = TokenBatch(weight_T, advantage_T, teacher_log_probs=teacher_T, old_log_probs=old_T)
    head = LinearHead(weight_VH, vocab_size, group, temperature, chunk_tokens)
    return fused_linear_loss(hidden_TH, target_T, head, token_loss(batch, config), main_grad_VH=main_grad_VH)
