"""Megatron's distributed optimizer over torch's AdamW, its fallback without Transformer Engine and Apex.

The fused Adams count steps per parameter group. torch's counts them per parameter, and Megatron-Core's checkpoint code
(`optimizer/distrib_optimizer.py`, 0.16.1) loses that count in places. The functions here skip the fused ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    for megatron in optimizer.chained_optimizers:
        if isinstance(megatron.optimizer, torch.optim.AdamW):
            yield megatron


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Create the state that AdamW creates in its first step, so that it can be saved and loaded before.

    Megatron reads the step count even before the first step, and loading the fully reshardable format restores every
    state except that count.
    """
    for megatron in _torch_adams(optimizer):
        for group in megatron.optimizer.param_groups:
            for parameter in group["params"]:
                megatron.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

        def set_states(model_param, tensors, megatron=megatron, original=megatron._set_main_param_and_optimizer_states):
            group, order = megatron.model_param_group_index_map[model_param]
            main_param = megatron.optimizer.param_groups[group]["params"][order]
            original(model_param, {"step": megatron.optimizer.state[main_param]["step"], **tensors})

        megatron._set_main_param_and_optimizer_states = set_states


def separate_step_counts(optimizer: MegatronOptimizer) -> None:
    """After loading, give every parameter its own count. Megatron shares one tensor, which torch increments per use."""
    for megatron in _torch_adams(optimizer):
        for state in megatron.optimizer.state.values():
            state["step"] = state["step"].clone()
