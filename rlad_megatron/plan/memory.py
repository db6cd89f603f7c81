"""The bytes that each part of a run takes on one GPU. Pure arithmetic: no torch, no files (docs/parallelism.md).

Weights, gradients and optimizer are exact: they are Megatron's buffers. Activations and work space are estimates.
Letters: T tokens of a micro-batch; b bytes of an element. All figures are for one rank. `data_parallel`
counts the ranks that share out the optimizer's state of the same weights: DP x CP.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from rlad_megatron.config import Fp8Config, LayoutConfig, OptimizerConfig, TrainConfig
from rlad_megatron.config.dtypes import ITEMSIZE
from rlad_megatron.models.recompute import modules_of
from rlad_megatron.models.registry import EMBEDDING, family_for
from rlad_megatron.models.shard_plan import counted_rows, pieces_of, stage_chunks
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.loss_memory import padded_vocab_size

# One FP8 copy of a weight: a byte, and its share of a scale (of the tensor; of 128 x 128 values; of 32 values).
FP8_BYTES = {"delayed": 1.0, "tensorwise": 1.0, "blockwise": 1.0 + 4 / 128**2, "mxfp8": 1.0 + 1 / 32}
# The weights that Transformer Engine multiplies in FP8.
_FP8_WEIGHTS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
# DistributedDataParallel's buffers: a parameter starts at a multiple of 64 elements, a bucket ends at one of 128.
_PARAMETER_MULTIPLE, _BUCKET_MULTIPLE = 64, 128
_PLAIN = TrainConfig()


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
    """A frozen model's parameters: no buffers, no gradients, no optimizer; with FP8 one copy, as rows."""
    in_fp8 = model.fp8_parameters(stage)
    size = (model.parameters(stage) - in_fp8) * model.element_bytes
    return size + int(in_fp8 * FP8_BYTES[model.fp8.recipe]) if in_fp8 else size


def activation_bytes(model: Model, stage: int, tokens: int, *, attention: str, train: TrainConfig = _PLAIN) -> int:
    """The peak of what forward keeps on a rank of the stage for backward, without the loss.

    tokens: of the whole micro-batch, of which context parallelism gives the rank its share.
    attention: "fused" (Transformer Engine's layers) or "local" (Megatron's layers of plain torch operations, as on
    CPUs). Both grow with T.
    train: what is recomputed, for one layer at a time, and what waits in host memory.
    """
    hidden, b, held = model.spec.hidden_size, model.element_bytes, held_tokens(model, tokens)
    layer = _layer_bytes(model, held, attention)
    recomputed = recomputed_bytes(model, tokens, attention=attention, train=train)
    layers, again = model.layers(stage), recomputed_layers(model, stage, train)
    away = max(0, train.offload_layers - 2)  # two of the offloaded layers are still or again on the GPU
    total = (layers - away) * layer - again * recomputed
    if attention == "local":
        total += tokens * model.spec.head_dim * 4  # rotary angles up to the longest sample, for all layers
    if model.is_last(stage):  # the last norm; the loss keeps the positions it needs of the output
        total += own_tokens(model, held) * (_local_norm_bytes(hidden, 0) if attention == "local" else 2 * hidden * b)
    # Backward reaches the first layers after it has freed the later ones, which are larger than what it recomputes.
    return math.ceil(total * model.in_flight(stage)) + (recomputed if again == layers else 0)


def recomputed_layers(model: Model, stage: int, train: TrainConfig) -> int:
    """Layers of a stage of which backward recomputes something: the first of each model chunk, or all."""
    counts = [len(layers) for layers in stage_chunks(model.spec.num_layers, model.layout)[stage]]
    return sum(min(count, train.recompute_layers or count) for count in counts)


def recomputed_bytes(model: Model, tokens: int, *, attention: str, train: TrainConfig) -> int:
    """The activations of a layer that backward recomputes (models/recompute.py)."""
    if train.recompute == "none":
        return 0
    tokens = held_tokens(model, tokens)
    b, hidden, *_ = _widths(model)
    if train.recompute == "full":  # all but the layer's input
        return _layer_bytes(model, tokens, attention) - own_tokens(model, tokens) * hidden * b
    return sum(_module_bytes(model, tokens, attention, module) for module in modules_of(train, model.spec))


def _module_bytes(model: Model, tokens: int, attention: str, module: str) -> int:
    """What a layer no longer keeps if backward recomputes one of its modules."""
    b, hidden, ffn, query, kv = _widths(model)
    kept = _product_input_bytes(model)
    if module == "mlp" and attention == "local":
        return _feed_forward_bytes(model, tokens, attention)  # from its input, the norm's output
    if module == "mlp":  # from the norm's input, because the norm is part of it
        return _feed_forward_bytes(model, tokens, attention) + own_tokens(model, tokens) * hidden * kept
    if module == "moe":
        return _feed_forward_bytes(model, tokens, attention)
    if module == "moe_act":  # the product of gate and up, which is the input of the last one
        return received_tokens(model, tokens) * ffn * kept
    if module == "layernorm":  # the norm before the experts; the other one is part of a product
        return own_tokens(model, tokens) * hidden * kept
    assert module == "core_attn" and attention == "local"
    # All but its output and its input: query, key, and the QKV product, of which the value is a view.
    product = 0 if _keeps_product(model) else query + 2 * kv
    return _attended_bytes(model, tokens) - tokens * (2 * query + kv + product) * b


def offloaded_bytes(model: Model, tokens: int, *, attention: str, train: TrainConfig) -> int:
    """The activations of a rank that wait in host memory."""
    return train.offload_layers * _layer_bytes(model, held_tokens(model, tokens), attention)


def _layer_bytes(model: Model, tokens: int, attention: str) -> int:
    """What a layer keeps for backward, in the order of the forward pass."""
    block = _local_attention_bytes if attention == "local" else _fused_attention_bytes
    return block(model, tokens) + _feed_forward_bytes(model, tokens, attention)


def _fused_attention_bytes(model: Model, tokens: int) -> int:
    """Norms and attention of fused operations.

    In FP8 the inputs of products are kept in FP8; attention's output also in b bytes, for its own backward.
    """
    b, hidden, _, query, kv = _widths(model)
    kept = _product_input_bytes(model)
    norms = 2 * (hidden * b + hidden * kept)  # input and output of both norms
    per_token = (query + 2 * kv) * b  # the QKV product
    per_token += (query + kv) * b  # query and key after rotation
    per_token += query * b + (query * kept if model.fp8.enabled else 0)  # attention's output, the next product's input
    heads = model.spec.num_heads // model.layout.tensor_parallel
    # Plus the log-sum-exp of each head and the scale of each norm.
    return tokens * (per_token + heads * 4) + own_tokens(model, tokens) * (norms + 2 * 4)


def _local_attention_bytes(model: Model, tokens: int) -> int:
    """Norms and attention of plain torch operations."""
    b, hidden, _, query, kv = _widths(model)
    per_token = (query + 2 * kv) * b if _keeps_product(model) else 0
    if _norms_query_and_key(model):
        heads = (query + kv) // model.spec.head_dim
        per_token += (query + kv) * 8 + heads * 4  # norms of query and key: float32 in and normalised, scale
        if b == 4:  # the norms' float32 inputs are views of the QKV product: the key's, and the query's of one group
            per_token -= (kv + (query if kv == model.spec.head_dim else 0)) * 4
    per_token += 4 * model.spec.head_dim * b  # cosines and sines, for query and key
    norms = own_tokens(model, tokens) * 2 * _local_norm_bytes(hidden, b)
    return norms + tokens * per_token + _attended_bytes(model, tokens)


def _keeps_product(model: Model) -> bool:
    """Whether local layers keep the QKV product: the value is a view of it, or the float32 inputs of norms are."""
    value = model.spec.num_kv_heads == model.spec.num_heads and model.layout.context_parallel == 1
    return value or (model.element_bytes == 4 and _norms_query_and_key(model))


def _norms_query_and_key(model: Model) -> bool:
    return bool(family_for(model.spec).config_fields.get("qk_layernorm"))


def _attended_bytes(model: Model, tokens: int) -> int:
    """What the attention of local layers keeps between the QKV product and the next one (models/attention.py)."""
    b, _, _, query, _ = _widths(model)
    repeated, context = model.spec.num_kv_heads != model.spec.num_heads, model.layout.context_parallel
    # Query, key and value, the last two gathered over context-parallel ranks and repeated for each query head.
    per_token = query * b + 2 * query * b * context
    # Attention's output by segments and joined, and its log-sum-exp.
    per_token += 2 * query * b + model.spec.num_heads // model.layout.tensor_parallel * 4
    if not repeated and context == 1:
        per_token -= query * b
    gathering = 0
    if context > 1:
        # The order of the gathered tokens, and masks of both chunks of a sample as long as the micro-batch.
        gathering = tokens * context * 8 + (tokens // 2) ** 2 * (2 * context + 1) * b
    return tokens * per_token + gathering


def _feed_forward_bytes(model: Model, tokens: int, attention: str) -> int:
    """The feed-forward part from its input on, with experts also the router and what it sends."""
    b, hidden, ffn, *_ = _widths(model)
    kept, spec = _product_input_bytes(model), model.spec
    # Gate and up, and their product. Plain operations keep up once more and the SiLU of the gate.
    inside = 5 * ffn * b if attention == "local" else 2 * ffn * b + ffn * kept
    if not spec.num_experts:
        return tokens * inside
    experts, chosen = spec.num_experts, spec.experts_per_token
    # In float32 the softmax, over the chosen experts or over all, and the weight of each expert; whether it is chosen.
    router = (chosen if spec.norm_topk_prob else experts) * 4 + experts * (4 + 1)
    router += chosen * (8 + 8)  # the chosen experts, and where their copies of the token are
    if attention == "local":
        inside += ffn * b  # the product again after the token's weight
    # The tokens sorted by expert, and their weights.
    return own_tokens(model, tokens) * router + received_tokens(model, tokens) * (hidden * kept + inside + 4)


def received_tokens(model: Model, tokens: int) -> int:
    """Copies of tokens that a rank's experts compute, assumed to be balanced: as many as the rank sends.

    Ranks that share an expert gather theirs.
    """
    return own_tokens(model, tokens) * model.spec.experts_per_token * model.layout.experts_tensor_parallel


def _product_input_bytes(model: Model) -> int:
    """Bytes of an element of a product's input."""
    return 1 if model.fp8.enabled else model.element_bytes


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
    """Bytes of an element; then widths on a rank: hidden size, feed-forward or one expert, query heads, key heads."""
    spec, layout = model.spec, model.layout
    tp = layout.tensor_parallel
    ffn = spec.expert_ffn_size // layout.experts_tensor_parallel if spec.num_experts else spec.ffn_size // tp
    return model.element_bytes, spec.hidden_size, ffn, spec.size("query") // tp, spec.size("kv") // tp


def forward_bytes(model: Model, tokens: int) -> int:
    """Work space of a forward-only pass: the residual streams of two layers and the inside of the widest layer.

    tokens: of the whole micro-batch.
    """
    tokens = held_tokens(model, tokens)
    b, hidden, ffn, query, _ = _widths(model)
    inside = tokens * max(3 * ffn, 5 * query)
    if model.spec.num_experts:
        # The experts' input and output, with gate, up and their product, or with the output sorted by sender.
        inside = max(tokens * 5 * query, received_tokens(model, tokens) * (2 * hidden + max(3 * ffn, hidden)))
    # One stream is always whole: the input of a product, for which shares are gathered.
    return (own_tokens(model, tokens) * 2 * hidden + tokens * hidden + inside) * b


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


def attention_work_bytes(model: Model, tokens: int) -> int:
    """The float32 gradient of the queries, which backward of fused attention adds up."""
    return held_tokens(model, tokens) * model.spec.size("query") // model.layout.tensor_parallel * 4


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
    return 2 * spec.num_layers * heads * spec.head_dim * ITEMSIZE[dtype]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
