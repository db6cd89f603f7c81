"""Build a Megatron-Core GPTModel from a model's spec."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from rlad_megatron import platform
from rlad_megatron.config import TRANSFORMER_ENGINE, ModelConfig, TrainConfig
from rlad_megatron.models.attention import PackedAttention
from rlad_megatron.models.load import is_quantized, load_weights, open_checkpoint
from rlad_megatron.models.norm import RmsNorm
from rlad_megatron.models.precision import uses_transformer_engine
from rlad_megatron.models.recompute import modules_of
from rlad_megatron.models.registry import Layer, family_for, megatron_fields, table_name
from rlad_megatron.models.rope import angles_of_tokens, rope_frequencies
from rlad_megatron.models.shard_plan import ShardPlan, check_layout, stage_chunks
from rlad_megatron.models.spec import LINEAR_ATTENTION, ModelSpec
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.parallel.loss_memory import padded_vocab_size

_PLAIN = TrainConfig()  # nothing is recomputed or offloaded


class HfRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding with Hugging Face's frequencies."""

    def __init__(self, inv_freq: torch.Tensor, rotated_dim: int, cp_group) -> None:
        super().__init__(kv_channels=rotated_dim, rotary_percent=1.0, use_cpu_initialization=True, cp_group=cp_group)
        self.inv_freq = inv_freq.to(platform.device())

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group=None) -> torch.Tensor:
        """Angles of positions 0 .. max_seq_len - 1, float32 [max_seq_len, 1, 1, rotated_dim].

        Layers take those of the chunks that a context-parallel rank holds. Megatron's own forward would cache the
        angles of the last 32 lengths, and the longest segment differs in nearly every micro-batch.
        """
        return self.get_emb(max_seq_len)


class HiddenStatesModel(GPTModel):
    """Megatron's GPTModel whose last stage returns hidden states [T, 1, H] instead of logits.

    The head is applied only to the positions that carry loss (models/forward.py), so the logits of prompts and padding
    are never computed.
    """

    def _preprocess(self, *, packed_seq_params: PackedSeqParams, **inputs: object) -> tuple:
        hidden_states, angles, *rest = super()._preprocess(packed_seq_params=packed_seq_params, **inputs)
        if not self.config.apply_rope_fusion:  # fused rotation restarts in each segment by itself
            angles = angles_of_tokens(angles, packed_seq_params.cu_seqlens_q)
        return hidden_states, angles, *rest

    def _postprocess(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden_states

    @property
    def head_weight(self) -> torch.Tensor:
        """[padded vocabulary / TP, H] on the last stage, shared with the embedding in tied models."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# An expert's weight; with grouped products all experts are one module.
_EXPERT = re.compile(r"\.local_experts\.(?P<expert>\d+)\.|\.experts\.(?P<linear>linear_fc\d)\.weight(?P<grouped>\d+)$")


def named_parameters(chunks: Iterable[GPTModel], spec: ModelSpec) -> dict[str, torch.Tensor]:
    """This rank's parameters by their names in the shard plan, which count layers and experts over the whole model."""
    family = family_for(spec)
    return {
        table_name(family, _global_name(chunk, name)): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def _global_name(chunk: GPTModel, name: str) -> str:
    found = _LAYER.match(name)
    if not found:
        return name
    layer, rest = chunk.decoder.layers[int(found[1])], name[found.end() :]

    def of_expert(found: re.Match) -> str:
        expert = layer.mlp.local_expert_indices[int(found["expert"] or found["grouped"])]
        if found["expert"]:
            return f".local_experts.{expert}."
        return f".experts.local_experts.{expert}.{found['linear']}.weight"

    return f"decoder.layers.{layer.layer_number - 1}.{_EXPERT.sub(of_expert, rest)}"


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


def activation_fields(train: TrainConfig) -> dict[str, object]:
    """Fields of TransformerConfig for what backward recomputes and for what waits in host memory."""
    if train.offload_layers:
        return {"cpu_offloading": True, "cpu_offloading_num_layers": train.offload_layers}
    if train.recompute == "none":
        return {}
    if train.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": []}  # `transformer_config` sets them
    method = "block" if train.recompute_layers else "uniform"
    fields: dict[str, object] = {"recompute_granularity": "full", "recompute_method": method}
    return fields | {"recompute_num_layers": train.recompute_layers or 1}


def transformer_config(
    spec: ModelSpec,
    model: ModelConfig,
    *,
    frozen: bool = False,
    train: TrainConfig = _PLAIN,
    router_replay: bool = False,
) -> TransformerConfig:
    """Megatron's configuration of a decoder.

    frozen: a teacher. train: what a student recomputes and offloads. router_replay: routers take given experts where a
    micro-batch has them (models/router_replay.py).

    Raises:
        ConfigError: a layout that does not divide the model.
    """
    layout = model.layout
    check_layout(spec, layout)
    counts = [sum(map(len, chunks)) for chunks in stage_chunks(spec.num_layers, layout)]
    uneven = {}
    if len(set(counts)) > 1:
        uneven["num_layers_in_first_pipeline_stage"] = counts[0]
        if len(counts) > 2:  # of two stages the last takes the rest; Megatron divides by the number of those unset
            uneven["num_layers_in_last_pipeline_stage"] = counts[-1]
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
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        # The interleaved schedule sends to the next stage and to the one before; of two stages, both are the same rank,
        # and only these separate calls keep the messages apart.
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        batch_p2p_comm=layout.virtual_pipeline == 1,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.experts_tensor_parallel,
        # The loss's weights already contain the global mean, so Megatron only sums (parallel/loss_scaling.py).
        calculate_per_token_loss=True,
        # Micro-batches differ in length (data/packing.py), so stages send each other the shapes first.
        variable_seq_lengths=layout.pipeline_parallel > 1,
        # Megatron refuses its default with variable lengths, even without experts.
        moe_token_dispatcher_type="alltoall",
        moe_router_dtype="fp32",
        moe_enable_routing_replay=router_replay,
        **uneven,
        **precision_fields(model, frozen=frozen),
        **activation_fields(train),
        **megatron_fields(spec),
        **platform.megatron_config_overrides(),
    )
    _, rope_factor = rope_frequencies(spec)
    if rope_factor != 1.0:
        # The factor scales the cosines and sines of query and key; fused rotation takes none, so their product gets it.
        config.softmax_scale = rope_factor**2 / math.sqrt(spec.head_dim)
    # Set afterwards: as arguments Megatron would require the kernels even if no model is built.
    config.apply_rope_fusion = config.transformer_impl == TRANSFORMER_ENGINE
    config.moe_grouped_gemm = config.apply_rope_fusion and spec.num_experts > 0
    if train.recompute == "selective":
        config.recompute_modules = list(modules_of(train, spec))  # moe_act is refused before there are grouped products
    return config


def layer_spec(config: TransformerConfig, layer_type: str, layer: Layer) -> ModuleSpec:
    """The modules of a layer: Transformer Engine's, or Megatron's own with attention over packed sequences."""
    if config.transformer_impl == TRANSFORMER_ENGINE:
        modules = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        modules = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
        _use_own_modules(modules.submodules)
        # Megatron's own layers give a norm before experts another name than Transformer Engine's do.
        modules.submodules.sharded_state_dict_keys_map = dict(layer.checkpoint_names)
    if layer_type == LINEAR_ATTENTION:
        modules.submodules.self_attention = _gated_delta_net(modules.submodules.self_attention.submodules)
    return modules


def _use_own_modules(layer: TransformerLayerSubmodules) -> None:
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    for modules in (layer, attention):
        for name in ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm"):
            if getattr(modules, name, IdentityOp) is not IdentityOp:
                setattr(modules, name, RmsNorm)


def _gated_delta_net(attention: SelfAttentionSubmodules) -> ModuleSpec:
    """A gated delta net in place of attention, between linear layers of the same kind."""
    # Imported here: Megatron-Core before 0.19 has none (platform/megatron_versions.py).
    from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules

    from rlad_megatron.models.gated_delta_net import GatedDeltaNet, OutputNorm, use_torch_kernels

    if not platform.has_cuda():
        use_torch_kernels()
    modules = GatedDeltaNetSubmodules(in_proj=attention.linear_qkv, out_norm=OutputNorm, out_proj=attention.linear_proj)
    return ModuleSpec(module=GatedDeltaNet, submodules=modules)


def decoder_spec(spec: ModelSpec, config: TransformerConfig, layers: Iterable[int]) -> TransformerBlockSubmodules:
    """The modules of a model chunk: its layers and the final norm.

    By default Megatron takes Transformer Engine's norm wherever that is installed, and it does not run on a CPU.
    """
    specs = {kind: layer_spec(config, kind, layer) for kind, layer in family_for(spec).layers.items()}
    if config.transformer_impl == TRANSFORMER_ENGINE:
        from megatron.core.extensions.transformer_engine import TENorm as final_norm
    else:
        final_norm = RmsNorm
    return TransformerBlockSubmodules([specs[spec.layer_types[layer]] for layer in layers], layer_norm=final_norm)


def build_model(
    spec: ModelSpec,
    model: ModelConfig,
    groups: ModelGroups,
    *,
    frozen: bool = False,
    train: TrainConfig = _PLAIN,
    router_replay: bool = False,
) -> list[HiddenStatesModel]:
    """This rank's part of the model, on its device, with Megatron's initial weights: its chunks, in layer order.

    With FP8, a frozen model holds its layers' weights only in FP8.

    A chunk takes packed sequences: `forward(input_ids [1, T], position_ids [1, T], None, packed_seq_params=...)`
    returns hidden states [T, 1, H], at the end of the last stage after the final norm (models/forward.py).
    """
    config = transformer_config(spec, model, frozen=frozen, train=train, router_replay=router_replay)
    chunks = [_build_chunk(spec, model, groups, config, chunk, frozen) for chunk in range(groups.vp_size)]
    if not frozen:
        _fuse_gradient_accumulation(chunks)
    return chunks


def _fuse_gradient_accumulation(chunks: Iterable[HiddenStatesModel]) -> None:
    """Have Transformer Engine's layers add their weights' gradients to DDP's float32 buffer themselves.

    Otherwise each micro-batch's gradient is rounded to bf16 before it is added. Set once the layers are built (they
    read it in forward): with Megatron's own flag set before, its output layer would refuse to be built without apex,
    and that layer never runs (models/head.py).
    """
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
                chunk.config.gradient_accumulation_fusion = True


def _build_chunk(
    spec: ModelSpec, model: ModelConfig, groups: ModelGroups, config: TransformerConfig, chunk: int, frozen: bool
) -> HiddenStatesModel:
    vp_stage = chunk if groups.vp_size > 1 else None
    layers = stage_chunks(spec.num_layers, model.layout)[groups.pp_rank][chunk]
    # Without gradients Transformer Engine makes no transposed copy of FP8 weights and keeps no copy in bf16.
    with torch.set_grad_enabled(not frozen):
        gpt = HiddenStatesModel(
            config=config,
            transformer_layer_spec=decoder_spec(spec, config, layers),
            vocab_size=padded_vocab_size(spec.vocab_size, groups.tp_size),
            max_sequence_length=spec.max_position_embeddings,
            pre_process=groups.pp_rank == 0 and chunk == 0,
            post_process=groups.is_last_stage and chunk == groups.vp_size - 1,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=spec.tied,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
    inv_freq, _ = rope_frequencies(spec)
    gpt.rotary_pos_emb = HfRotaryEmbedding(inv_freq, spec.rotated_dim, groups.collection.cp)
    float32 = _float32_parameters(spec)
    for name, parameter in gpt.named_parameters():
        if not is_quantized(parameter):
            dtype = torch.float32 if _LAYER.sub("", name) in float32 else platform.DTYPES[model.precision]
            parameter.data = parameter.data.to(platform.device(), dtype)
    return gpt.requires_grad_(False).eval() if frozen else gpt


def _float32_parameters(spec: ModelSpec) -> set[str]:
    """The parameters that stay in float32 in any precision, by their names within a layer."""
    rows = (row for layer in family_for(spec).layers.values() for row in layer.table.items())
    return {template.partition("{layer}.")[2] for template, rule in rows if rule.float32}


def build_loaded_model(
    spec: ModelSpec,
    model: ModelConfig,
    groups: ModelGroups,
    plan: ShardPlan,
    *,
    frozen: bool = False,
    train: TrainConfig = _PLAIN,
    router_replay: bool = False,
) -> list[HiddenStatesModel]:
    """A model with the weights of its folder; each rank reads its own slices."""
    chunks = build_model(spec, model, groups, frozen=frozen, train=train, router_replay=router_replay)
    load_weights(named_parameters(chunks, spec), plan.entries(groups.place), open_checkpoint(model.path, spec))
    return chunks
