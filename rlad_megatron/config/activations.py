"""Checks of what is done with activations until backward needs them. models/recompute.py has those that ask the model.

Source of the conflicts: Megatron-Core's `transformer/transformer_config.py:TransformerConfig.__post_init__`.
"""

from __future__ import annotations

from rlad_megatron.config.messages import Problems, shown
from rlad_megatron.config.tree import RunConfig


def activation_problems(config: RunConfig) -> Problems:
    """Problems of recompute and offload."""
    train, student = config.train, config.student
    layers, modules, offloaded = train.recompute_layers, train.recompute_modules, train.offload_layers
    local = "precision=fp32" if student.precision == "fp32" else "transformer_impl=local"
    stages = student.layout.pipeline_parallel
    return {
        f"train.recompute_layers={layers} has no effect with train.recompute={train.recompute}; use recompute=full, or "
        "recompute_layers=0": layers and train.recompute != "full",
        f"train.recompute_modules={shown(modules)} has no effect with train.recompute={train.recompute}; use "
        "recompute=selective, or recompute_modules=[]": modules and train.recompute != "selective",
        f"train.recompute_modules={shown(modules)}: under delayed scaling Megatron-Core recomputes neither moe_act nor "
        "layernorm; use other modules, or another student.fp8.recipe": (
            student.fp8.recipe == "delayed" and {"moe_act", "layernorm"} & {*modules}
        ),
        f"train.recompute_modules={shown(modules)} names a module twice; name each once": (
            len({*modules}) < len(modules)
        ),
        f"train.recompute_modules={shown(modules)}: moe_act is part of moe; drop one of them": {"moe", "moe_act"}
        <= {*modules},
        f"train.offload_layers={offloaded} needs Transformer Engine's layers, but student.{local} takes Megatron's "
        "local ones; use student.precision=bf16 with transformer_impl=auto, or offload_layers=0": (
            offloaded and (student.precision == "fp32" or student.transformer_impl == "local")
        ),
        f"train.offload_layers={offloaded}: Megatron-Core offloads activations only without pipeline stages, but "
        f"student.layout.pipeline_parallel={stages}; use 1, or offload_layers=0": offloaded and stages > 1,
        f"train.offload_layers={offloaded}: Megatron-Core offloads activations only if nothing is recomputed, but "
        f"train.recompute={train.recompute}; use none, or offload_layers=0": offloaded and train.recompute != "none",
    }
