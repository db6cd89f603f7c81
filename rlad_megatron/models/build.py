"""Build a Megatron-Core GPTModel from a Hugging Face configuration."""

from __future__ import annotations

import copy

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from rlad_megatron import platform
from rlad_megatron.config import LayoutConfig, ModelConfig
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.hf_config import load_hf_config as load_hf_config
from rlad_megatron.models.load import load_weights, open_checkpoint
from rlad_megatron.models.registry import family_for
from rlad_megatron.models.rope import rope_frequencies
from rlad_megatron.models.rules import model_shape, padded_vocab_size
from rlad_megatron.models.shard_plan import ShardPlan, check_layout, layers_per_stage
from rlad_megatron.parallel.groups import ModelGroups

if not hasattr(moe_utils, "te_general_gemm"):
    # The router compares it with None, but Megatron-Core 0.16.1 does not define it without Transformer Engine.
    moe_utils.te_general_gemm = None

_build_torch_norm = WrappedTorchNorm.__new__


def _build_marked_norm(cls, config: TransformerConfig, *args, **kwargs) -> torch.nn.Module:
    """torch's norm with the mark that Megatron's wrapper refuses sequence parallelism for want of.

    Under it each rank's norms see their share of the tokens, and Megatron sums the gradients of marked weights over the
    tensor-parallel group (`finalize_model_grads`). Transformer Engine's norms set the mark themselves.
    """
    plain = copy.copy(config)
    plain.sequence_parallel = False
    norm = _build_torch_norm(cls, plain, *args, **kwargs)
    norm.weight.sequence_parallel = config.sequence_parallel
    return norm


WrappedTorchNorm.__new__ = _build_marked_norm


class PackedRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding with Hugging Face's frequencies and positions that restart in each sample.

    Set `positions` (int64 [T]) before a forward; None counts from 0.
    """

    def __init__(self, inv_freq: torch.Tensor, head_dim: int, cp_group) -> None:
        super().__init__(kv_channels=head_dim, rotary_percent=1.0, use_cpu_initialization=True, cp_group=cp_group)
        self.inv_freq = inv_freq.to(platform.device())
        self.positions: torch.Tensor | None = None

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group=None) -> torch.Tensor:
        """Angles, float32 [T, 1, 1, head_dim]."""
        positions = self.positions
        if positions is None:
            positions = torch.arange(max_seq_len, device=self.inv_freq.device)
        angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class HiddenStatesModel(GPTModel):
    """Megatron's GPTModel whose last stage gives hidden states [T, 1, H] instead of logits.

    The head is applied to the positions that carry loss alone (models/forward.py), so the logits of prompts and
    padding are never made.
    """

    def _postprocess(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden_states

    @property
    def head_weight(self) -> torch.Tensor:
        """[padded vocabulary / TP, H] on the last stage, shared with the embedding in tied models."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(hf_config, layout: LayoutConfig, precision: str) -> TransformerConfig:
    """Megatron's configuration of a decoder.

    Raises:
        ConfigError: an activation other than SiLU, or a layout that does not divide the model.
    """
    family, shape = family_for(hf_config), model_shape(hf_config)
    check_layout(shape, layout)
    if hf_config.hidden_act != "silu":
        raise ConfigError(f"hidden_act={hf_config.hidden_act!r} in config.json is not covered; covered: silu")
    counts = layers_per_stage(shape.num_layers, layout.pipeline_parallel)
    uneven = (
        {"num_layers_in_first_pipeline_stage": counts[0], "num_layers_in_last_pipeline_stage": counts[-1]}
        if len(set(counts)) > 1
        else {}
    )
    dtype = platform.DTYPES[precision]
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # The weights of the loss already hold the global mean, so Megatron only has to sum (parallel/loss_scaling.py).
        calculate_per_token_loss=True,
        **uneven,
        **family.config_fields(hf_config),
        **platform.megatron_config_overrides(),
    )
    _, rope_factor = rope_frequencies(hf_config)
    if rope_factor != 1.0:
        # Megatron's attention derives the factor on cos and sin from these, as (0.1 * mscale * ln(e) + 1) / 1.
        config.yarn_rotary_scaling_factor = torch.e
        config.yarn_mscale = (rope_factor - 1.0) / 0.1
        config.yarn_mscale_all_dim = 0.0
    return config


def layer_spec(hf_config, config: TransformerConfig) -> ModuleSpec:
    """What a layer is made of: Megatron's own modules."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    # Megatron's own layers name a norm before experts otherwise than Transformer Engine's.
    spec.submodules.sharded_state_dict_keys_map = dict(family_for(hf_config).checkpoint_names)
    return spec


def build_model(hf_config, model: ModelConfig, groups: ModelGroups) -> HiddenStatesModel:
    """This rank's part of the model, on its device, with Megatron's initial weights.

    Takes packed sequences: `forward(input_ids [1, T], position_ids [1, T], attention_mask bool [1, 1, T, T])`
    gives hidden states [T, 1, H], on the last stage after the final norm.
    """
    shape = model_shape(hf_config)
    config = transformer_config(hf_config, model.layout, model.precision)
    gpt = HiddenStatesModel(
        config=config,
        transformer_layer_spec=layer_spec(hf_config, config),
        vocab_size=padded_vocab_size(shape.vocab_size, groups.tp_size),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tied,
        pg_collection=groups.collection,
    )
    inv_freq, _ = rope_frequencies(hf_config)
    gpt.rotary_pos_emb = PackedRotaryEmbedding(inv_freq, shape.head_dim, groups.collection.cp)
    # Also the dtype: torch's norms do not read params_dtype, and vLLM holds them in the model's.
    return gpt.to(platform.device(), platform.DTYPES[model.precision])


def build_loaded_model(hf_config, model: ModelConfig, groups: ModelGroups, plan: ShardPlan) -> HiddenStatesModel:
    """A model with the weights of its Hugging Face folder; each rank reads its own slices."""
    gpt = build_model(hf_config, model, groups)
    entries = plan.entries(tp_rank=groups.tp_rank, pp_rank=groups.pp_rank)
    load_weights(dict(gpt.named_parameters()), entries, open_checkpoint(model.path, hf_config))
    return gpt
