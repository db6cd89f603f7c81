"""Build the student under Megatron's DDP, its optimizer and its learning-rate schedule from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rlad_megatron import platform
from rlad_megatron.config import ModelConfig, OptimizerConfig
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.parallel.loss_scaling import sum_gradients
from rlad_megatron.trainer.torch_adam import allocate_state


def ddp_config(optimizer: OptimizerConfig, student: ModelConfig) -> DistributedDataParallelConfig:
    """float32 gradients, optimizer state sharded over data-parallel ranks, and what overlaps with computation."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
        fp8_param_gather=student.fp8.param_gather,
        reuse_grad_buf_for_mxfp8_param_ag=_reuses_gradient_buffer(student),
    )


def _reuses_gradient_buffer(student: ModelConfig) -> bool:
    """Megatron gathers MXFP8 weights in bf16 through the gradient buffer."""
    return student.fp8.param_gather and student.fp8.recipe == "mxfp8"


def optimizer_fields(optimizer: OptimizerConfig, student: ModelConfig) -> dict[str, object]:
    """Fields of Megatron's OptimizerConfig."""
    return {
        "lr": optimizer.lr,
        "min_lr": optimizer.min_lr,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "clip_grad": optimizer.clip_grad,
        "bf16": student.precision == "bf16",
        "fp16": student.precision == "fp16",
        "params_dtype": platform.DTYPES[student.precision],
        # Dynamic loss scaling for fp16: an update starts at the last scale and repeats at half of it while gradients
        # overflow (`Actor.update`). After `loss_scale_window` updates without overflow the scale doubles.
        "initial_loss_scale": 2.0**16,
        "loss_scale_window": 200,
        "hysteresis": 1,
        "use_distributed_optimizer": True,
        "overlap_param_gather": optimizer.overlap_param_gather,
        "use_precision_aware_optimizer": optimizer.precision_aware,
        "exp_avg_dtype": platform.DTYPES[optimizer.moments],
        "exp_avg_sq_dtype": platform.DTYPES[optimizer.moments],
        "fp8_recipe": student.fp8.recipe if student.fp8.enabled else None,
        "reuse_grad_buf_for_mxfp8_param_ag": _reuses_gradient_buffer(student),
        "optimizer_cpu_offload": optimizer.offload > 0,
        "optimizer_offload_fraction": optimizer.offload,
        "overlap_cpu_optimizer_d2h_h2d": optimizer.offload > 0,
    }


def wrap_for_training(
    chunks: Sequence[GPTModel],
    groups: ModelGroups,
    optimizer: OptimizerConfig,
    student: ModelConfig,
    *,
    reducing: Callable[[], None] = lambda: None,
) -> list[DistributedDataParallel]:
    """Each chunk in Megatron's DDP, which sums over data-parallel ranks (parallel/loss_scaling.py).

    reducing: called when this rank has computed its gradients, before it waits for those of others.
    """
    config = chunks[0].config  # shared by all of them
    sum_over_ranks = sum_gradients(groups.collection)

    def finalize(*arguments: Any, **named: Any) -> None:
        reducing()
        sum_over_ranks(*arguments, **named)

    config.finalize_model_grads_func = finalize
    # As Megatron-LM: one bucket for chunks after the first, whose reductions are hidden by the first's backward.
    wrapped = [
        DistributedDataParallel(
            config=config, ddp_config=ddp_config(optimizer, student), module=gpt, disable_bucketing=index > 0
        )
        for index, gpt in enumerate(chunks)
    ]
    if optimizer.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]  # only the last micro-batch reduces gradients
        config.no_sync_func = no_sync if groups.vp_size > 1 else no_sync[0]
    if optimizer.overlap_param_gather and groups.is_last_stage:
        # DDP waits for a weight before its module runs, but the head is applied outside of a module (models/head.py).
        last, gpt = wrapped[-1], chunks[-1]
        gpt.register_forward_hook(
            lambda *_: last.param_to_bucket_group[gpt.head_weight].finish_param_sync(skip_next_bucket_dispatch=True)
        )
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], optimizer: OptimizerConfig, student: ModelConfig, total_updates: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Megatron's distributed Adam and its learning-rate schedule, in units of optimizer updates."""
    megatron = get_megatron_optimizer(MegatronOptimizerConfig(**optimizer_fields(optimizer, student)), chunks)
    allocate_state(megatron)
    for group in megatron.param_groups:
        # The schedule sets these. In a checkpoint they would override the configuration (Megatron-Core 0.16 to 0.18),
        # or loading under another learning rate would not find the groups (0.19).
        del group["max_lr"], group["min_lr"]
    chunks[0].module.config.grad_scale_func = megatron.scale_loss
    scheduler = OptimizerParamScheduler(
        megatron,
        init_lr=optimizer.lr / (optimizer.warmup_steps + 1),  # not 0: the first update must count
        max_lr=optimizer.lr,
        min_lr=optimizer.lr if optimizer.decay == "constant" else optimizer.min_lr,
        lr_warmup_steps=optimizer.warmup_steps,
        lr_decay_steps=max(total_updates, optimizer.warmup_steps + 1),
        lr_decay_style=optimizer.decay,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=max(total_updates, 1),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # on resume, only the count comes from the checkpoint
    )
    return megatron, scheduler


def lower_loss_scale(optimizer: MegatronOptimizer) -> bool:
    """Halve the dynamic loss scale. False if there is none or it is at its minimum."""
    scalers = [part.grad_scaler for part in optimizer.chained_optimizers]
    if any(scaler is None or scaler.scale.item() <= scaler.min_scale.item() for scaler in scalers):
        return False
    for scaler in scalers:
        scaler.update(found_inf=True)
    return True


def gradients_are_finite(chunks: Sequence[DistributedDataParallel]) -> bool:
    """False on every rank if any rank holds a non-finite gradient. Collective over the world."""
    finite = torch.ones((), dtype=torch.float32, device=platform.device())
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            # A sum is finite only if every term is, and it needs no mask of the gradients' size.
            finite *= torch.isfinite(buffer.grad_data.float().sum())
    torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
    return bool(finite.item())


def training_bytes(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, int]:
    """Bytes on this rank of a student in training: "weights", "gradients" and "optimizer" (state and master copy)."""
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
    held = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in weights}
    state: dict[int, int] = {}
    for part in optimizer.chained_optimizers:
        tensors = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        for values in part.optimizer.state.values():
            tensors += [value for value in values.values() if torch.is_tensor(value)]
        # In float32 the optimizer updates views of the weights themselves.
        state |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors if _storage(tensor) not in held}
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    return {"weights": sum(held.values()), "gradients": gradients, "optimizer": sum(state.values())}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
