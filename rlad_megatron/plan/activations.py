"""The bytes of activations and of work space on one GPU: estimates that grow with the tokens. Pure arithmetic.

Letters: T tokens of a micro-batch; b bytes of an element. All figures are for one rank.
"""

from __future__ import annotations

import math

from rlad_megatron.config import TrainConfig
from rlad_megatron.models.recompute import modules_of
from rlad_megatron.models.registry import family_for
from rlad_megatron.models.shard_plan import stage_chunks
from rlad_megatron.models.spec import LINEAR_ATTENTION
from rlad_megatron.plan.memory import Model

_PLAIN = TrainConfig()
# Of the gated delta rule: tokens that its kernels, or Megatron's torch code, compute together.
_RULE_CHUNK = 64


def activation_bytes(model: Model, stage: int, tokens: int, *, attention: str, train: TrainConfig = _PLAIN) -> int:
    """The peak of what forward keeps on a rank of the stage for backward, without the loss.

    tokens: of the whole micro-batch, of which context parallelism gives the rank its share.
    attention: "fused" (Transformer Engine's layers) or "local" (Megatron's layers of plain torch operations, as on
    CPUs). Both grow with T.
    train: what is recomputed, for one layer at a time, and what waits in host memory.
    """
    hidden, b, held = model.spec.hidden_size, model.element_bytes, held_tokens(model, tokens)
    layers, again = model.layer_types(stage), recomputed_layers(model, stage, train)
    recomputed = {
        kind: recomputed_bytes(model, tokens, kind, attention=attention, train=train) for kind in {*layers, *again}
    }
    away = max(0, train.offload_layers - 2)  # two of the offloaded layers are still or again on the GPU
    total = sum(_layer_bytes(model, held, attention, kind) for kind in layers[away:])
    total -= sum(recomputed[kind] for kind in again)
    if attention == "local":
        total += tokens * model.spec.head_dim * 4  # rotary angles of the whole micro-batch, for all layers
    if model.is_last(stage):  # the last norm; the loss keeps the positions it needs of the output
        total += own_tokens(model, held) * (_local_norm_bytes(hidden, 0) if attention == "local" else 2 * hidden * b)
    # Backward reaches the first layers after it has freed the later ones, which are larger than what it recomputes.
    all_again = len(again) == len(layers)
    return math.ceil(total * model.in_flight(stage)) + (max(recomputed.values()) if all_again else 0)


def recomputed_layers(model: Model, stage: int, train: TrainConfig) -> list[str]:
    """The types of a stage's layers of which backward recomputes something: the first of each model chunk, or all."""
    if train.recompute == "none":
        return []
    chunks = stage_chunks(model.spec.num_layers, model.layout)[stage]
    return [
        model.spec.layer_types[layer] for layers in chunks for layer in layers[: train.recompute_layers or len(layers)]
    ]


def recomputed_bytes(model: Model, tokens: int, layer_type: str, *, attention: str, train: TrainConfig) -> int:
    """The activations of a layer that backward recomputes (models/recompute.py)."""
    if train.recompute == "none":
        return 0
    tokens = held_tokens(model, tokens)
    b, hidden, *_ = _widths(model)
    if train.recompute == "full":  # all but the layer's input
        return _layer_bytes(model, tokens, attention, layer_type) - own_tokens(model, tokens) * hidden * b
    modules = modules_of(train, model.spec)
    if layer_type == LINEAR_ATTENTION:  # whose rule is recomputed with the whole layer only
        modules = tuple(module for module in modules if module != "core_attn")
    return sum(_module_bytes(model, tokens, attention, module) for module in modules)


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
    held = held_tokens(model, tokens)
    return sum(_layer_bytes(model, held, attention, kind) for kind in model.layer_types(0)[: train.offload_layers])


def _layer_bytes(model: Model, tokens: int, attention: str, layer_type: str) -> int:
    """What a layer keeps for backward, in the order of the forward pass."""
    if layer_type == LINEAR_ATTENTION:
        return _gated_delta_net_bytes(model, tokens, attention) + _feed_forward_bytes(model, tokens, attention)
    block = _local_attention_bytes if attention == "local" else _fused_attention_bytes
    return block(model, tokens) + _feed_forward_bytes(model, tokens, attention)


def _fused_attention_bytes(model: Model, tokens: int) -> int:
    """Norms and attention of fused operations.

    In FP8 the inputs of products are kept in FP8; attention's output also in b bytes, for its own backward.
    """
    b, hidden, _, query, kv = _widths(model)
    kept = _product_input_bytes(model)
    norms = 2 * (hidden * b + hidden * kept)  # input and output of both norms
    gate = query * b if _has_output_gate(model) else 0  # its part of the product; once more with the output gated
    per_token = (query + 2 * kv) * b  # the QKV product
    per_token += (query + kv) * b  # query and key after rotation
    per_token += query * b + (query * kept if model.fp8.enabled else 0)  # attention's output, the next product's input
    per_token += 2 * gate
    heads = model.spec.num_heads // model.layout.tensor_parallel
    # Plus the log-sum-exp of each head and the scale of each norm.
    return tokens * (per_token + heads * 4) + own_tokens(model, tokens) * (norms + 2 * 4)


def _gated_delta_net_bytes(model: Model, tokens: int, attention: str) -> int:
    """Norms and the gated delta net (models/gated_delta_net.py)."""
    spec, layout, b, kept = model.spec, model.layout, model.element_bytes, _product_input_bytes(model)
    shares = layout.tensor_parallel
    key, value = spec.size("gdn_key") // shares, spec.size("gdn_value") // shares
    heads = spec.gdn_value_heads // shares
    repeated = heads * spec.gdn_key_head_dim if spec.gdn_value_heads != spec.gdn_key_heads else 0
    per_token = (2 * key + 2 * value + 2 * heads) * b  # the product
    per_token += (2 * key + value) * b + 2 * key * b  # after the convolution; query and key normalised
    per_token += 2 * repeated * b + 2 * value * b  # repeated for each value head; value and gate in one piece
    per_token += heads * (2 * 4 + _RULE_CHUNK * b)  # decay and strength; the rule's matrix within a chunk
    per_token += value * b + value * kept  # the rule's output, normalised and gated: the next product's input
    hidden = spec.hidden_size
    if attention != "local":
        norms = 2 * (hidden * b + hidden * kept + 4)
    else:
        norms = 2 * _local_norm_bytes(hidden, b)
        # Torch code keeps the rule's operands in float32, matrices within a chunk, and the rows of the one that it
        # inverts one by one. Fitted to one measurement; that segments are padded to whole chunks is not counted.
        per_token += 4 * (3 * (repeated or key) + 3 * value) + heads * 4 * (_RULE_CHUNK**2 // 3 + 10 * _RULE_CHUNK)
    return tokens * per_token + own_tokens(model, tokens) * norms


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
    if _has_output_gate(model):
        per_token += query * (b + 3 * 4)  # the gate's part of the product; gate and output in float32
    norms = own_tokens(model, tokens) * 2 * _local_norm_bytes(hidden, b)
    return norms + tokens * per_token + _attended_bytes(model, tokens)


def _keeps_product(model: Model) -> bool:
    """Whether local layers keep the QKV product: the value is a view of it, or the float32 inputs of norms are."""
    value = model.spec.num_kv_heads == model.spec.num_heads and model.layout.context_parallel == 1
    return value or (model.element_bytes == 4 and _norms_query_and_key(model))


def _norms_query_and_key(model: Model) -> bool:
    return bool(family_for(model.spec).config_fields.get("qk_layernorm"))


def _has_output_gate(model: Model) -> bool:
    return bool(family_for(model.spec).config_fields.get("attention_output_gate"))


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
    shared = spec.shared_expert_ffn_size // model.layout.tensor_parallel
    always = tokens * (shared * (5 * b if attention == "local" else 2 * b + kept) + hidden * b * bool(shared))
    # In float32 the softmax, over the chosen experts or over all, and the weight of each expert; whether it is chosen.
    router = (chosen if spec.norm_topk_prob else experts) * 4 + experts * (4 + 1)
    router += chosen * (8 + 8)  # the chosen experts, and where their copies of the token are
    if attention == "local":
        inside += ffn * b  # the product again after the token's weight
    # The tokens sorted by expert, and their weights.
    return always + own_tokens(model, tokens) * router + received_tokens(model, tokens) * (hidden * kept + inside + 4)


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
    # A gated delta net: its product, after the convolution, normalised, in one piece, and its result.
    net = (6 * model.spec.size("gdn_key") + 8 * model.spec.size("gdn_value")) // model.layout.tensor_parallel
    inside = tokens * max(3 * ffn, 5 * query, net)
    if model.spec.num_experts:
        # The experts' input and output, with gate, up and their product, or with the output sorted by sender.
        inside = max(tokens * 5 * query, received_tokens(model, tokens) * (2 * hidden + max(3 * ffn, hidden)))
    # One stream is always whole: the input of a product, for which shares are gathered.
    return (own_tokens(model, tokens) * 2 * hidden + tokens * hidden + inside) * b


def attention_work_bytes(model: Model, tokens: int) -> int:
    """The float32 gradient of the queries, which backward of fused attention adds up."""
    return held_tokens(model, tokens) * model.spec.size("query") // model.layout.tensor_parallel * 4
