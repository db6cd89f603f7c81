"""How many bytes each part of a run takes on one GPU. Pure arithmetic: no torch, no files (docs/parallelism.md).

Weights, gradients and optimizer are exact: they are Megatron's buffers. Activations and work space are estimates.
Letters: T tokens of a micro-batch; b bytes of an element. Everything is for one rank of one tensor-parallel group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from rlad_megatron.config import LayoutConfig
from rlad_megatron.models.known import ShapeFacts
from rlad_megatron.models.rules import ModelShape, model_shape, padded_vocab_size
from rlad_megatron.models.shard_plan import build_shard_plan, layers_per_stage

ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "bfloat16": 2, "float16": 2, "float32": 4}
# DistributedDataParallel's buffers: a parameter starts at a multiple of 64 elements, a bucket ends at one of 128.
_PARAMETER_MULTIPLE, _BUCKET_MULTIPLE = 64, 128


@dataclass(frozen=True)
class Model:
    """A model in a layout, as far as memory is concerned."""

    facts: ShapeFacts  # of config.json (models/known.py)
    layout: LayoutConfig
    precision: str  # bf16 | fp32

    @cached_property
    def shape(self) -> ModelShape:
        return model_shape(self.facts)

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.precision]

    @property
    def vocab_columns(self) -> int:
        """Columns of the head on one rank: V' of the padded vocabulary."""
        tensor_parallel = self.layout.tensor_parallel
        return padded_vocab_size(self.shape.vocab_size, tensor_parallel) // tensor_parallel

    def layers(self, stage: int) -> int:
        return layers_per_stage(self.shape.num_layers, self.layout.pipeline_parallel)[stage]

    def is_last(self, stage: int) -> bool:
        return stage == self.layout.pipeline_parallel - 1

    def parameter_sizes(self, stage: int) -> tuple[tuple[str, int], ...]:
        """(name, elements) of each parameter of a rank of the stage; the same on every tensor-parallel rank."""
        return _parameter_sizes(self.facts, self.layout)[stage]

    def parameters(self, stage: int) -> int:
        return sum(size for _, size in self.parameter_sizes(stage))

    @property
    def total_parameters(self) -> int:
        """Of the whole model, without padding and copies: as in its Hugging Face files."""
        return _total_parameters(self.facts)


@lru_cache(maxsize=256)
def _total_parameters(facts: ShapeFacts) -> int:
    return sum(math.prod(shape) for shape in build_shard_plan(facts, LayoutConfig()).hf_shapes.values())


@lru_cache(maxsize=256)
def _parameter_sizes(facts: ShapeFacts, layout: LayoutConfig) -> tuple[tuple[tuple[str, int], ...], ...]:
    plan = build_shard_plan(facts, layout)
    return tuple(
        tuple((entry.name, math.prod(entry.shape)) for entry in plan.entries(tp_rank=0, pp_rank=stage))
        for stage in range(layout.pipeline_parallel)
    )


def buffer_elements(model: Model, stage: int, data_parallel: int) -> int:
    """Elements of Megatron's parameter buffer, and of its gradient buffer, of a rank of the stage.

    Tied embeddings that lie on two pipeline stages have a bucket of their own.
    """
    shared = model.shape.tied and model.layout.pipeline_parallel > 1
    buckets = {"rest": 0, "embedding": 0}
    for name, size in model.parameter_sizes(stage):
        bucket = (
            "embedding" if shared and name in ("embedding.word_embeddings.weight", "output_layer.weight") else "rest"
        )
        buckets[bucket] += round_up(size, _PARAMETER_MULTIPLE)
    return sum(round_up(size, math.lcm(data_parallel, _BUCKET_MULTIPLE)) for size in buckets.values())


def weight_bytes(model: Model, stage: int, data_parallel: int) -> int:
    """The trained model's parameters, in its precision."""
    return buffer_elements(model, stage, data_parallel) * model.element_bytes


def gradient_bytes(model: Model, stage: int, data_parallel: int) -> int:
    """Megatron's main gradients, float32 whatever the precision."""
    return buffer_elements(model, stage, data_parallel) * 4


def optimizer_bytes(model: Model, stage: int, data_parallel: int) -> int:
    """Adam's two moments in float32, and for bf16 a float32 master copy, spread over the data-parallel ranks.

    Exact where each parameter is a multiple of 64 elements, as in every known model; else the share of the largest
    rank is smaller by the padding that it holds, less than 64 elements a parameter.
    """
    copies = 2 if model.precision == "fp32" else 3
    return buffer_elements(model, stage, data_parallel) // data_parallel * copies * 4


def frozen_weight_bytes(model: Model, stage: int) -> int:
    """A teacher's parameters: no buffers, no gradients, no optimizer."""
    return model.parameters(stage) * model.element_bytes


def activation_bytes(model: Model, stage: int, tokens: int, *, attention: str) -> int:
    """What forward keeps for backward on a rank of the stage, in its fullest moment: no recompute, no loss.

    attention: "fused" (Transformer Engine's layers: grows with T) or "local" (Megatron's layers of plain torch
    operations, as on CPUs: scores of T x T for each head). Stages hold PP - stage micro-batches at once (1F1B).
    """
    hidden, b = model.shape.hidden_size, model.element_bytes
    layer = _local_layer_bytes if attention == "local" else _fused_layer_bytes
    total = model.layers(stage) * layer(model, tokens)
    if attention == "local":
        total += tokens * tokens  # the mask, one byte each, shared by the layers
    if model.is_last(stage):
        total += own_tokens(model, tokens) * (_local_norm_bytes(hidden, b) if attention == "local" else 2 * hidden * b)
    return total * (model.layout.pipeline_parallel - stage)


def _fused_layer_bytes(model: Model, tokens: int) -> int:
    """Activations of a layer of fused operations, in the order of the forward pass."""
    b, hidden, ffn, query, kv = _widths(model)
    norms = 2 * hidden + 2 * hidden  # in and out of the first norm and of the second
    per_token = query + 2 * kv  # the QKV product
    per_token += query + kv  # query and key after rotation
    per_token += query  # attention's result, the input of its output product
    per_token += 2 * ffn + ffn  # gate and up, and their product
    heads = model.shape.num_heads // model.layout.tensor_parallel
    # With the log-sum-exp of each head, and the scale of each norm.
    return tokens * (per_token * b + heads * 4) + own_tokens(model, tokens) * (norms * b + 2 * 4)


def _local_layer_bytes(model: Model, tokens: int) -> int:
    """Activations of a layer of plain torch operations, in the order of the forward pass."""
    b, hidden, ffn, query, kv = _widths(model)
    repeated = model.shape.num_kv_heads != model.shape.num_heads
    per_token = 0
    product = 0 if repeated else (query + 2 * kv) * b  # the value is a view of the QKV product
    if model.facts.model_type == "qwen3":
        heads = (query + kv) // model.shape.head_dim
        per_token += (query + kv) * 8 + heads * 4  # norms of query and key: float32 in and normalised, scale
        if b == 4:  # the norms' float32 inputs are views of the QKV product: the key's, and the query's of one group
            per_token -= (kv + (query if kv == model.shape.head_dim else 0)) * 4
            product = (query + 2 * kv) * b
    per_token += product
    per_token += 4 * model.shape.head_dim * b  # cosines and sines, for query and key
    per_token += 3 * query * b  # query, key and value, the last two repeated for each query head
    per_token += query * b  # attention's result
    per_token += 5 * ffn * b  # gate and up, up once more, SiLU of the gate, their product
    if not repeated:
        per_token -= query * b
    norms = own_tokens(model, tokens) * 2 * _local_norm_bytes(hidden, b)
    return norms + tokens * per_token + score_bytes(model, tokens)


def own_tokens(model: Model, tokens: int) -> int:
    """Tokens that a rank holds outside attention and feed-forward: under sequence parallelism its share."""
    return tokens // model.layout.tensor_parallel if model.layout.sequence_parallel else tokens


def _local_norm_bytes(width: int, b: int) -> int:
    """RMSNorm of plain torch operations, for one token: float32 input, normalised, output, scale."""
    return width * (4 + 4 + b) + 4


def score_bytes(model: Model, tokens: int) -> int:
    """Attention probabilities of one layer of local attention: float32, and a copy in the model's precision."""
    b, heads = model.element_bytes, model.shape.num_heads // model.layout.tensor_parallel
    return tokens * tokens * heads * (4 + (b if b != 4 else 0))


def _widths(model: Model) -> tuple[int, int, int, int, int]:
    """Bytes of an element, then of a rank: hidden size, feed-forward width, all query heads, all key heads."""
    shape, tp = model.shape, model.layout.tensor_parallel
    return (
        model.element_bytes,
        shape.hidden_size,
        shape.ffn_size // tp,
        shape.size("query") // tp,
        shape.size("kv") // tp,
    )


def forward_bytes(model: Model, tokens: int, *, attention: str) -> int:
    """Work space of a pass that keeps nothing, the teacher's: two layers' streams and the widest layer's inside."""
    b, hidden, ffn, query, _ = _widths(model)
    # Of the streams one is whole in any case: the input of a product, for which shares are gathered.
    total = (own_tokens(model, tokens) * 2 * hidden + tokens * (hidden + max(3 * ffn, 5 * query))) * b
    return total + (2 * score_bytes(model, tokens) if attention == "local" else 0)


def largest_gradient_bytes(model: Model, stage: int) -> int:
    """The largest parameter's gradient in the model's precision, before it is added to the float32 buffer."""
    return max(size for _, size in model.parameter_sizes(stage)) * model.element_bytes


def server_weight_bytes(model: Model, tensor_parallel: int, dtype: str) -> int:
    """A vLLM server's weights on one of its GPUs; norms, which it does not cut, are too small to matter."""
    return -(-model.total_parameters // tensor_parallel) * ELEMENT_BYTES[dtype]


def kv_bytes_per_token(shape: ModelShape, tensor_parallel: int, dtype: str) -> int:
    """Keys and values of one token on one GPU of a server; with more GPUs than key-value heads these are repeated."""
    heads = max(1, shape.num_kv_heads // tensor_parallel)
    return 2 * shape.num_layers * heads * shape.head_dim * ELEMENT_BYTES[dtype]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
