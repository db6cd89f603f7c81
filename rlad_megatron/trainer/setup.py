"""Build what the trainer needs from the configuration: the student under Megatron's DDP, its optimizer and schedule."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rlad_megatron import platform
from rlad_megatron.config import OptimizerConfig
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.parallel.loss_scaling import sum_gradients
from rlad_megatron.trainer.torch_adam import allocate_state


def wrap_for_training(gpt: GPTModel, groups: ModelGroups) -> DistributedDataParallel:
    """Megatron's DDP with gradients in float32, summed over data-parallel ranks (parallel/loss_scaling.py)."""
    gpt.config.finalize_model_grads_func = sum_gradients(groups.collection)
    return DistributedDataParallel(
        config=gpt.config,
        ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        module=gpt,
    )


def build_optimizer(
    model: DistributedDataParallel, optimizer: OptimizerConfig, precision: str, total_updates: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Megatron's distributed Adam and its learning-rate schedule, counted in optimizer updates."""
    megatron = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            clip_grad=optimizer.clip_grad,
            bf16=precision == "bf16",
            params_dtype=platform.DTYPES[precision],
            use_distributed_optimizer=True,
        ),
        [model],
    )
    allocate_state(megatron)
    model.module.config.grad_scale_func = megatron.scale_loss
    scheduler = OptimizerParamScheduler(
        megatron,
        init_lr=optimizer.lr / (optimizer.warmup_steps + 1),  # not 0, so that the first update counts
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
        override_opt_param_scheduler=True,  # on resume the configuration decides; the checkpoint gives the count
    )
    return megatron, scheduler


def gradients_are_finite(model: DistributedDataParallel) -> bool:
    """False on every rank when any rank holds a non-finite gradient. Collective over the world."""
    finite = torch.ones((), dtype=torch.float32, device=platform.device())
    for buffer in (*model.buffers, *model.expert_parallel_buffers):
        # A sum is finite only if every term is; it needs no mask as large as the gradients.
        finite *= torch.isfinite(buffer.grad_data.float().sum())
    torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
    return bool(finite.item())
