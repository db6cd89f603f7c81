"""The bytes that each part of a run takes on one GPU. Pure arithmetic: no torch, no files (docs/parallelism.md).

Weights, gradients and optimizer are exact: they are Megatron's buffers. Activations and work space are estimates.
Letters: T tokens of a micro-batch; b bytes of an element. All figures are for one rank. `data_parallel`
counts the ranks that share out the optimizer's state of the same weights: DP x CP.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from rlad_megatron.config import Fp8Config, LayoutConfig, OptimizerConfig
from rlad_megatron.config.dtypes import ITEMSIZE
from rlad_megatron.models.registry import EMBEDDING
from rlad_megatron.models.shard_plan import counted_rows, pieces_of, stage_chunks
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.loss_memory import padded_vocab_size

# One FP8 copy of a weight: a byte, and its share of a scale (of the tensor; of 128 x 128 values; of 32 values).
FP8_BYTES = {"delayed": 1.0, "tensorwise": 1.0, "blockwise": 1.0 + 4 / 128**2, "mxfp8": 1.0 + 1 / 32}
# The weights that Transformer Engine multiplies in FP8.
_FP8_WEIGHTS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
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

    def layers(self, stage: int) -> int:
        return sum(map(len, stage_chunks(self.spec.num_layers, self.layout)[stage]))

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
        return _parameter_sizes(self.spec, self.layout, stage)

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
        found.append(Parameter(row.name, layer, chunk, row.is_expert, size, count))
    return tuple(found)


@lru_cache(maxsize=1024)
def _buffers(model: Model, stage: int, data_parallel: int) -> tuple[tuple[int, int], ...]:
    """(elements, ranks over which its optimizer state is spread) of each bucket of Megatron's buffers.

    Each model chunk has its own. Experts dealt over ranks have a buffer for their own data-parallel group. Tied
    embeddings on two pipeline stages have a dedicated bucket; weights kept in FP8 have a dedicated buffer.
    """
    layout, shared = model.layout, model.spec.tied and model.layout.pipeline_parallel > 1
    buckets: dict[tuple[int, int, str], int] = defaultdict(int)
    for parameter in model.parameter_sizes(stage):
        bucket, ranks = "rest", data_parallel
        if shared and parameter.name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            bucket = "embedding"
        elif model.fp8.param_gather and model._in_fp8(parameter):
            bucket = "fp8"
        if parameter.is_expert and layout.expert_parallel > 1:
            bucket, ranks = f"experts, {bucket}", layout.expert_data_parallel(data_parallel)
        size = round_up(parameter.size, _PARAMETER_MULTIPLE) * parameter.number
        buckets[parameter.chunk, ranks, bucket] += size
    return tuple((round_up(size, math.lcm(ranks, _BUCKET_MULTIPLE)), ranks) for (_, ranks, _), size in buckets.items())


def buffer_elements(model: Model, stage: int, data_parallel: int) -> int:
    """Elements of Megatron's parameter buffers, and of its gradient buffers, on a rank of the stage."""
    return sum(size for size, _ in _buffers(model, stage, data_parallel))


def weight_bytes(model: Model, stage: int, data_parallel: int) -> int:
    """The trained model's parameters in its precision; those kept in FP8 count twice, as rows and as columns."""
    size = buffer_elements(model, stage, data_parallel) * model.element_bytes
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

    Exact if each parameter is a multiple of 64 elements, as in every known model. Otherwise the largest rank's share is
    smaller by the padding that it holds, less than 64 elements per parameter.
    """
    each = master_bytes(model, optimizer) + 2 * ITEMSIZE[optimizer.moments]
    share = sum(size // ranks for size, ranks in _buffers(model, stage, data_parallel))
    return int(share * each * (1 - optimizer.offload))


def frozen_weight_bytes(model: Model, stage: int) -> int:
    """A teacher's parameters: no buffers, no gradients, no optimizer; with FP8 one copy, as rows."""
    in_fp8 = model.fp8_parameters(stage)
    size = (model.parameters(stage) - in_fp8) * model.element_bytes
    return size + int(in_fp8 * FP8_BYTES[model.fp8.recipe]) if in_fp8 else size


def activation_bytes(model: Model, stage: int, tokens: int, *, attention: str, recompute: str = "none") -> int:
    """The peak of what forward keeps for backward on a rank of the stage, without the loss.

    tokens: of the whole micro-batch, of which context parallelism gives the rank its share.
    attention: "fused" (Transformer Engine's layers) or "local" (Megatron's layers of plain torch operations, as on
    CPUs). Both grow with T.
    recompute: as in TrainConfig; recomputed activations exist for one layer at a time.
    """
    hidden, b, held = model.spec.hidden_size, model.element_bytes, held_tokens(model, tokens)
    layer = _local_layer_bytes(model, held) if attention == "local" else _fused_layer_bytes(model, held)
    recomputed = recomputed_bytes(model, tokens, attention=attention, recompute=recompute)
    total = model.layers(stage) * (layer - recomputed)
    if attention == "local":
        total += tokens * model.spec.head_dim * 4  # rotary angles up to the longest sample, for all layers
    if model.is_last(stage):  # the last norm; the loss keeps the positions it needs of the output
        total += own_tokens(model, held) * (_local_norm_bytes(hidden, 0) if attention == "local" else 2 * hidden * b)
    return math.ceil(total * model.in_flight(stage)) + recomputed


def recomputed_bytes(model: Model, tokens: int, *, attention: str, recompute: str) -> int:
    """The activations of a layer that backward recomputes (models/build.py:recompute_fields)."""
    tokens = held_tokens(model, tokens)
    b, hidden, ffn, *_ = _widths(model)
    if recompute == "none":
        return 0
    if recompute == "full":  # all but the layer's input
        layer = _local_layer_bytes(model, tokens) if attention == "local" else _fused_layer_bytes(model, tokens)
        return layer - own_tokens(model, tokens) * hidden * b
    if attention == "local":
        return tokens * 5 * ffn * b  # the feed-forward part from its input
    half = 1 if model.fp8.enabled else b
    # The feed-forward part from its norm's input.
    return tokens * (2 * ffn * b + ffn * half) + own_tokens(model, tokens) * hidden * half


def _fused_layer_bytes(model: Model, tokens: int) -> int:
    """Activations of a layer of fused operations, in the order of the forward pass.

    In FP8 the inputs of the four products are kept in FP8; attention's output also in b bytes, for its own backward.
    """
    b, hidden, ffn, query, kv = _widths(model)
    kept = 1 if model.fp8.enabled else b
    norms = 2 * (hidden * b + hidden * kept)  # input and output of both norms
    per_token = (query + 2 * kv) * b  # the QKV product
    per_token += (query + kv) * b  # query and key after rotation
    per_token += query * b + (query * kept if model.fp8.enabled else 0)  # attention's output, the next product's input
    per_token += 2 * ffn * b + ffn * kept  # gate and up, and their product
    heads = model.spec.num_heads // model.layout.tensor_parallel
    # Plus the log-sum-exp of each head and the scale of each norm.
    return tokens * (per_token + heads * 4) + own_tokens(model, tokens) * (norms + 2 * 4)


def _local_layer_bytes(model: Model, tokens: int) -> int:
    """Activations of a layer of plain torch operations, in the order of the forward pass."""
    b, hidden, ffn, query, kv = _widths(model)
    repeated = model.spec.num_kv_heads != model.spec.num_heads
    per_token = 0
    context = model.layout.context_parallel
    product = 0 if repeated or context > 1 else (query + 2 * kv) * b  # the value is a view of the QKV product
    if model.spec.model_type == "qwen3":
        heads = (query + kv) // model.spec.head_dim
        per_token += (query + kv) * 8 + heads * 4  # norms of query and key: float32 in and normalised, scale
        if b == 4:  # the norms' float32 inputs are views of the QKV product: the key's, and the query's of one group
            per_token -= (kv + (query if kv == model.spec.head_dim else 0)) * 4
            product = (query + 2 * kv) * b
    per_token += product
    per_token += 4 * model.spec.head_dim * b  # cosines and sines, for query and key
    # Query, key and value, the last two gathered over context-parallel ranks and repeated for each query head.
    per_token += query * b + 2 * query * b * context
    # Attention's output by segments and joined, and its log-sum-exp.
    per_token += 2 * query * b + model.spec.num_heads // model.layout.tensor_parallel * 4
    per_token += 5 * ffn * b  # gate and up, up once more, SiLU of the gate, their product
    if not repeated and context == 1:
        per_token -= query * b
    gathering = 0
    if context > 1:
        # The order of the gathered tokens, and masks of both chunks of a sample as long as the micro-batch.
        gathering = tokens * context * 8 + (tokens // 2) ** 2 * (2 * context + 1) * b
    return own_tokens(model, tokens) * 2 * _local_norm_bytes(hidden, b) + tokens * per_token + gathering


def held_tokens(model: Model, tokens: int) -> int:
    """Tokens of a whole micro-batch that a context-parallel rank holds."""
    return tokens // model.layout.context_parallel


def own_tokens(model: Model, tokens: int) -> int:
    """Of the tokens that a rank holds, those outside attention and feed-forward: under sequence parallelism a share."""
    return tokens // model.layout.tensor_parallel if model.layout.sequence_parallel else tokens


def _local_norm_bytes(width: int, b: int) -> int:
    """RMSNorm of plain torch operations, for one token: float32 input, normalised, output, scale."""
    return width * (4 + 4 + b) + 4


def _widths(model: Model) -> tuple[int, int, int, int, int]:
    """Bytes of an element; then widths on a rank: hidden size, feed-forward, all query heads, all key heads."""
    spec, tp = model.spec, model.layout.tensor_parallel
    return (model.element_bytes, spec.hidden_size, spec.ffn_size // tp, spec.size("query") // tp, spec.size("kv") // tp)


def forward_bytes(model: Model, tokens: int) -> int:
    """Work space of a forward-only pass: the residual streams of two layers and the inside of the widest layer.

    tokens: of the whole micro-batch.
    """
    tokens = held_tokens(model, tokens)
    b, hidden, ffn, query, _ = _widths(model)
    # One stream is always whole: the input of a product, for which shares are gathered.
    return (own_tokens(model, tokens) * 2 * hidden + tokens * (hidden + max(3 * ffn, 5 * query))) * b


def largest_gradient_bytes(model: Model, stage: int) -> int:
    """The largest parameter's gradient in the model's precision, before it is added to the float32 buffer."""
    return max(parameter.size for parameter in model.parameter_sizes(stage)) * model.element_bytes


def server_weight_bytes(model: Model, tensor_parallel: int, dtype: str) -> int:
    """A vLLM server's weights on one of its GPUs. Norms, which it does not cut, are too small to matter."""
    return -(-model.total_parameters // tensor_parallel) * ITEMSIZE[dtype]


def kv_bytes_per_token(spec: ModelSpec, tensor_parallel: int, dtype: str) -> int:
    """Keys and values of one token on one GPU of a server. More GPUs than key-value heads repeat them."""
    heads = max(1, spec.num_kv_heads // tensor_parallel)
    return 2 * spec.num_layers * heads * spec.head_dim * ITEMSIZE[dtype]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
