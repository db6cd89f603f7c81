"""Which activations backward recomputes, or waits for in host memory, and what Megatron-Core asks of it. Torch-free.

Sources: Megatron-Core's `transformer/transformer_config.py` (fields `recompute_*` and `cpu_offloading_*`), and where
they are used: `transformer_block.py:_checkpointed_forward`, `transformer_layer.py`, `moe/experts.py`.
"""

from __future__ import annotations

from rlad_megatron.config import RunConfig, TrainConfig
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.precision import uses_transformer_engine
from rlad_megatron.models.shard_plan import stage_chunks
from rlad_megatron.models.spec import ModelSpec


def modules_of(train: TrainConfig, spec: ModelSpec) -> tuple[str, ...]:
    """The modules of a layer that `train.recompute=selective` recomputes, by Megatron's names.

    By default the feed-forward part, which is the largest: attention keeps no scores.
    """
    return train.recompute_modules or (("moe",) if spec.num_experts else ("mlp",))


def check_activations(config: RunConfig, spec: ModelSpec) -> None:
    """Raise ConfigError if the student has no such modules or layers to recompute or to offload.

    `config.validate` checks the fields against each other.
    """
    train = config.train
    fused = uses_transformer_engine(config.student, gpu=train.gpus_per_node > 0)
    needs_experts = "" if spec.num_experts else "this model has no experts"
    needs_engine = "" if fused else "Megatron-Core recomputes it with Transformer Engine's layers only"
    # Why a module is not there, or why recomputing it frees nothing.
    missing = {
        "core_attn": "Transformer Engine's attention keeps nothing that could be recomputed" if fused else "",
        "mlp": "the layers of this model have experts" if spec.num_experts else "",
        "moe": needs_experts,
        "moe_act": needs_experts or needs_engine,
        "layernorm": needs_engine or (needs_experts and "its norms are part of the products after them"),
    }
    for module in train.recompute_modules:
        if missing[module]:
            usable = [name for name, reason in missing.items() if not reason]
            raise ConfigError(f"train.recompute_modules has {module}, but {missing[module]}; use {', '.join(usable)}")
    longest = max(len(layers) for chunks in stage_chunks(spec.num_layers, config.student.layout) for layers in chunks)
    if train.recompute_layers > longest:
        where = "chunk of a pipeline stage" if config.student.layout.virtual_pipeline > 1 else "pipeline stage"
        raise ConfigError(
            f"train.recompute_layers={train.recompute_layers} exceeds the {longest} layers of a {where}; use at most "
            f"{longest}, or 0 for all"
        )
    if train.offload_layers >= spec.num_layers:
        raise ConfigError(
            f"train.offload_layers={train.offload_layers}: Megatron-Core keeps the last layer's activations on the "
            f"GPU, and the student has {spec.num_layers} layers; use at most {spec.num_layers - 1}"
        )
