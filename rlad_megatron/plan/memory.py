"""The bytes that each part of a run takes on one GPU. Pure arithmetic: no torch, no files (docs/parallelism.md).

Weights, gradients and optimizer are exact: they are Megatron's buffers. Activations are in plan/activations.py.
All figures are for one rank. `data_parallel`
counts the ranks that share out the optimizer's state of the same weights: DP x CP.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from rlad_megatron.config import Fp8Config, LayoutConfig, OptimizerConfig
from rlad_megatron.config.dtypes import ITEMSIZE
from rlad_megatron.models.registry import EMBEDDING
from rlad_megatron.models.shard_plan import counted_rows, pieces_of, stage_chunks
from rlad_megatron.models.spec import FULL_ATTENTION, LINEAR_ATTENTION, ModelSpec
from rlad_megatron.parallel.loss_memory import padded_vocab_size

# One FP8 copy of a weight: a byte, and its share of a scale (of the tensor; of 128 x 128 values; of 32 values).
FP8_BYTES = {"delayed": 1.0, "tensorwise": 1.0, "blockwise": 1.0 + 4 / 128**2, "mxfp8": 1.0 + 1 / 32}
# The weights that Transformer Engine multiplies in FP8.
_FP8_WEIGHTS = tuple(
    f"{name}.weight" for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj")
)
# DistributedDataParallel's buffers: a parameter starts at a multiple of 64 elements, a bucket ends at one of 128.
_PARAMETER_MULTIPLE, _BUCKET_MULTIPLE = 64, 128


class Parameter(NamedTuple):
    """A parameter on a rank, or the experts of a layer, which are as large as each other."""

    name: str
    layer: int | None
    chunk: int  # of the rank's model chunks
    is_expert: bool
    size: int  # elements
    number: int
    float32: bool = False  # in any precision


@dataclass(frozen=True)
class Model:
    """A model in a layout and a precision."""

    spec: ModelSpec
    layout: LayoutConfig
    precision: str  # bf16 | fp16 | fp32
    fp8: Fp8Config = field(default_factory=Fp8Config)

    @property
    def element_bytes(self) -> int:
        return ITEMSIZE[self.precision]

    @property
    def vocab_columns(self) -> int:
        """Columns of the head on one rank: V' of the padded vocabulary."""
        tensor_parallel = self.layout.tensor_parallel
        return padded_vocab_size(self.spec.vocab_size, tensor_parallel) // tensor_parallel

    def layer_types(self, stage: int) -> list[str]:
        """Of each layer of a stage."""
        chunks = stage_chunks(self.spec.num_layers, self.layout)[stage]
        return [self.spec.layer_types[layer] for layers in chunks for layer in layers]

    def layers(self, stage: int) -> int:
        return len(self.layer_types(stage))

    def is_last(self, stage: int) -> bool:
        return stage == self.layout.pipeline_parallel - 1

    def in_flight(self, stage: int) -> float:
        """Micro-batches whose activations a stage holds at the same time, at most.

        1F1B: one for each stage from this one on. Interleaved, Megatron counts passes through a chunk
        (pipeline_parallel/schedules.py:get_pp_rank_microbatches).
        """
        stages, chunks = self.layout.pipeline_parallel, self.layout.virtual_pipeline
        if chunks == 1:
            return stages - stage
        return (2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks

    def parameter_sizes(self, stage: int) -> tuple[Parameter, ...]:
        """The parameters of the stage on one rank; all ranks of the stage hold as much."""
        # Asked for many layouts, which often differ only in how tokens are cut.
        weights = replace(self.layout, context_parallel=1, cp_comm_type="p2p", sequence_parallel=False)
        return _parameter_sizes(self.spec, weights, stage)

    def parameters(self, stage: int) -> int:
        return sum(parameter.size * parameter.number for parameter in self.parameter_sizes(stage))

    def fp8_parameters(self, stage: int) -> int:
        """Elements of the weights that are multiplied in FP8."""
        if not self.fp8.enabled:
            return 0
        return sum(found.size * found.number for found in self.parameter_sizes(stage) if self._in_fp8(found))

    def _in_fp8(self, parameter: Parameter) -> bool:
        at_an_end = parameter.layer in (0, self.spec.num_layers - 1)
        return parameter.name.endswith(_FP8_WEIGHTS) and not (self.fp8.first_last_layers_bf16 and at_an_end)

    @property
    def total_parameters(self) -> int:
        """Of the whole model, without padding and copies: as in its Hugging Face files."""
        return _total_parameters(self.spec)


@lru_cache(maxsize=256)
def _total_parameters(spec: ModelSpec) -> int:
    return sum(
        math.prod(full) * count
        for row, count in counted_rows(spec, LayoutConfig(), 0)
        for full in row.table.hf_shapes(spec).values()
    )


@lru_cache(maxsize=1024)
def _parameter_sizes(spec: ModelSpec, layout: LayoutConfig, stage: int) -> tuple[Parameter, ...]:
    chunks = stage_chunks(spec.num_layers, layout)[stage]
    found = []
    for row, count in counted_rows(spec, layout, stage):
        size = math.prod(pieces_of(row.table, spec, row.tensor_parallel(layout), 0)[0])
        if row.index:
            layer = row.index[0]
            chunk = next(index for index, layers in enumerate(chunks) if layer in layers)
        else:
            layer, chunk = None, 0 if row.rule is EMBEDDING and not row.is_copy else len(chunks) - 1
        found.append(Parameter(row.name, layer, chunk, row.is_expert, size, count, row.rule.float32))
    return tuple(found)


class Bucket(NamedTuple):
    """A bucket of Megatron's buffers."""

    elements: int
    ranks: int  # over which its optimizer state is spread
    float32: bool  # in any precision


@lru_cache(maxsize=1024)
def _buckets(model: Model, stage: int, data_parallel: int) -> tuple[Bucket, ...]:
    """The buckets of a rank.

    Each model chunk has its own. Experts dealt over ranks have a buffer for their own data-parallel group, and
    parameters of other dtypes one for each. Tied embeddings on two pipeline stages have a dedicated bucket; weights
    kept in FP8 have a dedicated buffer.
    """
    layout, shared = model.layout, model.spec.tied and model.layout.pipeline_parallel > 1
    sizes: dict[tuple[int, int, str, bool], int] = defaultdict(int)
    for parameter in model.parameter_sizes(stage):
        bucket, ranks = "rest", data_parallel
        if shared and parameter.name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            bucket = "embedding"
        elif model.fp8.param_gather and model._in_fp8(parameter):
            bucket = "fp8"
        if parameter.is_expert and layout.expert_parallel > 1:
            bucket, ranks = f"experts, {bucket}", layout.expert_data_parallel(data_parallel)
        size = round_up(parameter.size, _PARAMETER_MULTIPLE) * parameter.number
        sizes[parameter.chunk, ranks, bucket, parameter.float32 and model.precision != "fp32"] += size
    return tuple(
        Bucket(round_up(size, math.lcm(ranks, _BUCKET_MULTIPLE)), ranks, float32)
        for (_, ranks, _, float32), size in sizes.items()
    )


def buffer_elements(model: Model, stage: int, data_parallel: int) -> int:
    """Elements of Megatron's parameter buffers, and of its gradient buffers, on a rank of the stage."""
    return sum(bucket.elements for bucket in _buckets(model, stage, data_parallel))


def weight_bytes(model: Model, stage: int, data_parallel: int) -> int:
    """The trained model's parameters in its precision; those kept in FP8 count twice, as rows and as columns."""
    buckets = _buckets(model, stage, data_parallel)
    size = sum(bucket.elements * (4 if bucket.float32 else model.element_bytes) for bucket in buckets)
    if not model.fp8.param_gather:
        return size
    in_fp8 = model.fp8_parameters(stage)
    return size - in_fp8 * model.element_bytes + int(2 * in_fp8 * FP8_BYTES[model.fp8.recipe])


def fp8_copy_bytes(model: Model, stage: int) -> int:
    """The FP8 copies of bf16 weights that Transformer Engine makes in an update, as rows and as columns."""
    if not model.fp8.enabled or model.fp8.param_gather:
        return 0
    return int(2 * model.fp8_parameters(stage) * FP8_BYTES[model.fp8.recipe])


def gradient_bytes(model: Model, stage: int, data_parallel: int) -> int:
    """Megatron's main gradients, float32 in any precision."""
    return buffer_elements(model, stage, data_parallel) * 4


def master_bytes(model: Model, optimizer: OptimizerConfig) -> int:
    """Bytes of an element's float32 copy: 0 in fp32, 2 if Adam itself holds the half that bf16 lacks, else 4."""
    if model.precision == "fp32":
        return 0
    own = optimizer.precision_aware and not optimizer.offload and model.fp8.recipe in ("none", "delayed")
    return 2 if own else 4


def optimizer_bytes(model: Model, stage: int, data_parallel: int, optimizer: OptimizerConfig) -> int:
    """Adam's two moments and the master copy, spread over the data-parallel ranks, minus what is on the host.

    Exact if each parameter is a multiple of 64 elements, as in known models without gated delta nets. Otherwise the
    largest rank's share is smaller by the padding that it holds, less than 64 elements per parameter.
    """
    moments, master = 2 * ITEMSIZE[optimizer.moments], master_bytes(model, optimizer)
    size = sum(
        bucket.elements // bucket.ranks * (moments + (0 if bucket.float32 else master))
        for bucket in _buckets(model, stage, data_parallel)
    )
    return int(size * (1 - optimizer.offload))


def frozen_weight_bytes(model: Model, stage: int) -> int:
    """A frozen model's parameters: no buffers, no gradients, no optimizer; with FP8 one copy, as rows."""
    in_fp8 = model.fp8_parameters(stage)
    size = (model.parameters(stage) - in_fp8) * model.element_bytes
    wider = 4 - model.element_bytes
    size += sum(found.size * found.number * wider for found in model.parameter_sizes(stage) if found.float32)
    return size + int(in_fp8 * FP8_BYTES[model.fp8.recipe]) if in_fp8 else size


def largest_gradient_bytes(model: Model, stage: int) -> int:
    """The largest parameter's gradient in the model's precision, before it is added to the float32 buffer."""
    return max(parameter.size for parameter in model.parameter_sizes(stage)) * model.element_bytes


def group_count(layout: LayoutConfig, data_parallel: int) -> int:
    """Groups of several ranks in which a rank communicates, besides the world. data_parallel: 1 for a frozen model."""
    shared = (layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel, data_parallel)
    experts = 2 * (layout.expert_parallel > 1)  # to exchange tokens, and the other copies of a rank's experts
    return sum(size > 1 for size in shared) + experts


def group_bytes(count: int) -> int:
    """NCCL's buffers of so many groups (2.29: NCCL_BUFFSIZE, and those of LL128 and LL; channels of an NVLink node)."""
    channels, buffers = 24, 4 * 2**20 + 120 * 640 * 8 * 8 + 8 * 512 * 8 * 16
    return count * channels * buffers


def unread_gradient_bytes(model: Model, stage: int) -> int:
    """What Transformer Engine's layers return in place of gradients: a tensor for each shape of weights."""
    sizes = {found.size for found in model.parameter_sizes(stage) if found.layer is not None}
    return sum(sizes) * model.element_bytes


def server_weight_bytes(model: Model, tensor_parallel: int, dtype: str) -> int:
    """A vLLM server's weights on one of its GPUs. Norms, which it does not cut, are too small to matter."""
    return -(-model.total_parameters // tensor_parallel) * ITEMSIZE[dtype]


def kv_bytes_per_token(spec: ModelSpec, tensor_parallel: int, dtype: str) -> int:
    """Keys and values of one token on one GPU of a server. More GPUs than key-value heads repeat them."""
    heads = max(1, spec.num_kv_heads // tensor_parallel)
    return 2 * spec.layer_types.count(FULL_ATTENTION) * heads * spec.head_dim * ITEMSIZE[dtype]


def state_bytes_per_request(spec: ModelSpec, tensor_parallel: int, dtype: str) -> int:
    """What gated delta nets hold of a request on one GPU of a server, whatever its length: states and convolutions.

    States are in float32, convolutions in the model's dtype. Sources: vllm/model_executor/layers/mamba/mamba_utils.py:
    gated_delta_net_state_shape; vllm/model_executor/models/config.py, `mamba_ssm_dtype`.
    """
    convolution = (spec.gdn_conv_width - 1) * (2 * spec.size("gdn_key") + spec.size("gdn_value"))
    state = spec.gdn_value_heads * spec.gdn_key_head_dim * spec.gdn_value_head_dim
    layers = spec.layer_types.count(LINEAR_ATTENTION)
    return layers * (convolution * ITEMSIZE[dtype] + state * 4) // tensor_parallel


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
