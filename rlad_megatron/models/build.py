"""Build a Megatron-Core GPTModel from a model's spec."""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from rlad_megatron import platform
from rlad_megatron.config import TRANSFORMER_ENGINE, ModelConfig
from rlad_megatron.models.attention import PackedAttention
from rlad_megatron.models.load import is_quantized, load_weights, open_checkpoint
from rlad_megatron.models.precision import uses_transformer_engine
from rlad_megatron.models.registry import family_for, megatron_fields, table_name
from rlad_megatron.models.rope import rope_frequencies
from rlad_megatron.models.shard_plan import ShardPlan, check_layout, layers_per_stage
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.parallel.loss_memory import padded_vocab_size


class HfRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding with Hugging Face's frequencies."""

    def __init__(self, inv_freq: torch.Tensor, head_dim: int, cp_group) -> None:
        super().__init__(kv_channels=head_dim, rotary_percent=1.0, use_cpu_initialization=True, cp_group=cp_group)
        self.inv_freq = inv_freq.to(platform.device())

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group=None) -> torch.Tensor:
        """Angles of positions 0 .. max_seq_len - 1, float32 [max_seq_len, 1, 1, head_dim].

        Megatron's layers apply them from 0 in each segment of a packed sequence, and take those of the chunks that a
        context-parallel rank holds. Megatron's own forward would cache the
        angles of the last 32 lengths, and the longest segment differs in nearly every micro-batch.
        """
        return self.get_emb(max_seq_len)


class HiddenStatesModel(GPTModel):
    """Megatron's GPTModel whose last stage returns hidden states [T, 1, H] instead of logits.

    The head is applied only to the positions that carry loss (models/forward.py), so the logits of prompts and padding
    are never computed.
    """

    def _postprocess(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden_states

    @property
    def head_weight(self) -> torch.Tensor:
        """[padded vocabulary / TP, H] on the last stage, shared with the embedding in tied models."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def named_parameters(gpt: GPTModel, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """This rank's parameters by their names in the shard plan."""
    family = family_for(spec)
    return {table_name(family, name): parameter for name, parameter in gpt.named_parameters()}


def precision_fields(model: ModelConfig, *, frozen: bool) -> dict[str, object]:
    """Fields of TransformerConfig for storage and compute precision."""
    dtype, fp8 = platform.DTYPES[model.precision], model.fp8
    fields = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": model.precision == "bf16",
        "fp16": model.precision == "fp16",
        "transformer_impl": TRANSFORMER_ENGINE if uses_transformer_engine(model, gpu=platform.has_cuda()) else "local",
    }
    if fp8.enabled:
        fields |= {
            "fp8": fp8.format,
            "fp8_recipe": fp8.recipe,
            "fp8_param": frozen or fp8.param_gather,
            "first_last_layers_bf16": fp8.first_last_layers_bf16,
        }
    if fp8.recipe == "delayed":
        fields |= {"fp8_amax_history_len": fp8.amax_history_len, "fp8_amax_compute_algo": fp8.amax_compute}
    return fields


def recompute_fields(recompute: str, *, experts: bool) -> dict[str, object]:
    """Fields of TransformerConfig for `train.recompute`.

    Selective recomputes the feed-forward part, which is the largest: attention keeps no scores.
    """
    if recompute == "none":
        return {}
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": ["moe" if experts else "mlp"]}


def transformer_config(
    spec: ModelSpec, model: ModelConfig, *, frozen: bool = False, recompute: str = "none"
) -> TransformerConfig:
    """Megatron's configuration of a decoder.

    frozen: a teacher. recompute: as in TrainConfig.

    Raises:
        ConfigError: a layout that does not divide the model.
    """
    layout = model.layout
    check_layout(spec, layout)
    counts = layers_per_stage(spec.num_layers, layout.pipeline_parallel)
    uneven = (
        {"num_layers_in_first_pipeline_stage": counts[0], "num_layers_in_last_pipeline_stage": counts[-1]}
        if len(set(counts)) > 1
        else {}
    )
    config = TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.context_parallel,
        cp_comm_type=layout.cp_comm_type,
        # The loss's weights already contain the global mean, so Megatron only sums (parallel/loss_scaling.py).
        calculate_per_token_loss=True,
        # Micro-batches differ in length (data/packing.py), so stages send each other the shapes first.
        variable_seq_lengths=layout.pipeline_parallel > 1,
        # Megatron refuses its default with variable lengths, even without experts.
        moe_token_dispatcher_type="alltoall",
        **uneven,
        **precision_fields(model, frozen=frozen),
        **recompute_fields(recompute, experts=spec.num_experts > 0),
        **megatron_fields(spec),
        **platform.megatron_config_overrides(),
    )
    _, rope_factor = rope_frequencies(spec)
    if rope_factor != 1.0:
        # The factor scales the cosines and sines of query and key; fused rotation takes none, so their product gets it.
        config.softmax_scale = rope_factor**2 / math.sqrt(spec.head_dim)
    # Set afterwards: as an argument Megatron would require the kernel even if no model is built.
    config.apply_rope_fusion = config.transformer_impl == TRANSFORMER_ENGINE
    return config


def layer_spec(spec: ModelSpec, config: TransformerConfig) -> ModuleSpec:
    """The modules of a layer: Transformer Engine's, or Megatron's own with attention over packed sequences."""
    if config.transformer_impl == TRANSFORMER_ENGINE:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
        )
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    # Megatron's own layers give a norm before experts another name than Transformer Engine's do.
    layer.submodules.sharded_state_dict_keys_map = dict(family_for(spec).checkpoint_names)
    return layer


def decoder_spec(spec: ModelSpec, config: TransformerConfig, pp_rank: int) -> ModuleSpec | TransformerBlockSubmodules:
    """The modules of a pipeline stage: its layers and the final norm.

    By default Megatron takes Transformer Engine's norm wherever that is installed, and it does not run on a CPU.
    """
    layer = layer_spec(spec, config)
    if config.transformer_impl == TRANSFORMER_ENGINE:
        return layer
    layers = [layer] * get_num_layers_to_build(config, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layers, layer_norm=WrappedTorchNorm)


def build_model(
    spec: ModelSpec, model: ModelConfig, groups: ModelGroups, *, frozen: bool = False, recompute: str = "none"
) -> HiddenStatesModel:
    """This rank's part of the model, on its device, with Megatron's initial weights.

    With FP8, a frozen model holds its layers' weights only in FP8.

    The model takes packed sequences: `forward(input_ids [1, T], position_ids [1, T], None, packed_seq_params=...)`
    returns hidden states [T, 1, H], on the last stage after the final norm (models/forward.py).
    """
    config = transformer_config(spec, model, frozen=frozen, recompute=recompute)
    # Without gradients Transformer Engine makes no transposed copy of FP8 weights and keeps no copy in bf16.
    with torch.set_grad_enabled(not frozen):
        gpt = HiddenStatesModel(
            config=config,
            transformer_layer_spec=decoder_spec(spec, config, groups.pp_rank),
            vocab_size=padded_vocab_size(spec.vocab_size, groups.tp_size),
            max_sequence_length=spec.max_position_embeddings,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=spec.tied,
            pg_collection=groups.collection,
        )
    inv_freq, _ = rope_frequencies(spec)
    gpt.rotary_pos_emb = HfRotaryEmbedding(inv_freq, spec.head_dim, groups.collection.cp)
    for parameter in gpt.parameters():
        if not is_quantized(parameter):
            # The dtype too: torch's norms ignore params_dtype, and vLLM holds them in the model's.
            parameter.data = parameter.data.to(platform.device(), platform.DTYPES[model.precision])
    return gpt.requires_grad_(False) if frozen else gpt


def build_loaded_model(
    spec: ModelSpec,
    model: ModelConfig,
    groups: ModelGroups,
    plan: ShardPlan,
    *,
    frozen: bool = False,
    recompute: str = "none",
) -> HiddenStatesModel:
    """A model with the weights of its folder; each rank reads its own slices."""
    gpt = build_model(spec, model, groups, frozen=frozen, recompute=recompute)
    entries = plan.entries(tp_rank=groups.tp_rank, pp_rank=groups.pp_rank)
    load_weights(named_parameters(gpt, spec), entries, open_checkpoint(model.path, spec))
    return gpt
