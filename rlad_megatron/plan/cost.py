"""What a run costs in time: operations of a pass, products computed again, and bytes sent. Counted, not measured.

Letters: T tokens of the longest sample; b bytes of an element.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rlad_megatron.config import TrainConfig
from rlad_megatron.models.recompute import modules_of
from rlad_megatron.models.registry import family_for
from rlad_megatron.models.spec import FULL_ATTENTION, LINEAR_ATTENTION, ModelSpec
from rlad_megatron.plan.activations import recomputed_layers
from rlad_megatron.plan.memory import Model

UPDATE_PASSES = 3  # backward computes the gradients of both factors of each product


def forward_flops(spec: ModelSpec, lengths: Iterable[int], positions: int) -> int:
    """Floating-point operations of the products of one forward pass. An update takes UPDATE_PASSES times as many.

    Megatron-LM's count (`num_floating_point_operations` in megatron/training/training.py): two for a multiplication and
    an addition, causal attention as half of the square, no norms, activation functions or recompute. Where that counts
    padded sequences and a head over all tokens of a padded vocabulary, this counts what is needed: real lengths, and
    the head where there is loss.

    lengths: tokens of each sequence. positions: tokens with loss, over all sequences.
    """
    layers = sum(
        count * length * layers_of_type * sum(_layer_flops(spec, length, kind).values())
        for length, count in Counter(lengths).items()
        for kind, layers_of_type in Counter(spec.layer_types).items()
    )
    return layers + 2 * positions * spec.hidden_size * spec.vocab_size


def recomputed_share(model: Model, train: TrainConfig, longest: int) -> float:
    """Operations that backward computes again, as a share of an update's: forward once, backward twice as much.

    longest: T. Attention is counted at that length, and the head for every token.
    """
    if train.recompute == "none":
        return 0.0
    spec = model.spec
    parts = {kind: _layer_flops(spec, longest, kind) for kind in {*spec.layer_types}}
    layers = sum(sum(parts[kind].values()) for kind in spec.layer_types)
    update = UPDATE_PASSES * (layers + 2 * spec.hidden_size * spec.vocab_size)
    # Norms and activation functions are no products.
    names = modules_of(train, spec)
    again = {
        kind: sum(flops for name, flops in each.items() if train.recompute == "full" or name in names)
        for kind, each in parts.items()
    }
    stages = range(model.layout.pipeline_parallel)
    return sum(again[kind] for stage in stages for kind in recomputed_layers(model, stage, train)) / update


def _layer_flops(spec: ModelSpec, longest: int, layer_type: str) -> dict[str, int]:
    """Floating-point operations of a token in a layer's forward pass, by module: two for each weight."""
    hidden, query, kv = spec.hidden_size, spec.size("query"), spec.size("kv")
    if layer_type == LINEAR_ATTENTION:
        flops = _gated_delta_net_flops(spec)
    else:
        gate = query if family_for(spec).config_fields.get("attention_output_gate") else 0
        flops = {
            "products of attention": 2 * hidden * (2 * query + gate + 2 * kv),
            "core_attn": 2 * longest * query,  # scores and values, each of half of the tokens on average
        }
    if spec.num_experts:
        computed = spec.expert_ffn_size * spec.experts_per_token + spec.shared_expert_ffn_size
        flops["moe"] = 2 * hidden * (3 * computed + spec.num_experts)
    else:
        flops["mlp"] = 2 * hidden * 3 * spec.ffn_size
    return flops


def _gated_delta_net_flops(spec: ModelSpec) -> dict[str, int]:
    """Of a token: the products around the rule, the convolution, and the rule as its kernels compute it.

    In chunks of 64 tokens (arXiv 2412.06464, section 3.3): products within the chunk for keys with keys, queries with
    keys, and the inverse with keys and values, and products with the state for keys, queries and the update.
    """
    key, value, heads = spec.size("gdn_key"), spec.size("gdn_value"), spec.gdn_value_heads
    k, v, chunk = spec.gdn_key_head_dim, spec.gdn_value_head_dim, 64
    products = spec.hidden_size * (2 * key + 3 * value + 2 * heads)
    rule = heads * (chunk * (3 * k + 2 * v) + 3 * k * v)
    convolution = spec.gdn_conv_width * (2 * key + value)
    return {"products of gated delta nets": 2 * products, "gated delta rule": 2 * (rule + convolution)}


def sent_bytes(model: Model, *, trained: bool) -> dict[str, int]:
    """Bytes that all ranks together send for a token in a pass through the model, by kind of parallelism.

    trained: in an update, so backward too. What recompute sends again is not counted.
    """
    spec, layout, b = model.spec, model.layout, model.element_bytes
    hidden, layers, kv = spec.hidden_size, spec.num_layers, spec.size("kv")
    tensor, context, experts = layout.tensor_parallel, layout.context_parallel, layout.expert_parallel
    passes = 2 if trained else 1
    # A ring sums over the ranks, or gathers and scatters, with 2 (TP - 1) copies of the token: around attention or a
    # gated delta net, and around a feed-forward part without experts, or a shared expert. What sequence parallelism
    # gathered is gathered again for the gradients of weights.
    sums = 1 if spec.num_experts and not spec.shared_expert_ffn_size else 2
    again = trained and layout.sequence_parallel
    sent = {"TP": layers * sums * (2 * passes + again) * (tensor - 1) * hidden * b}
    # Without sequence parallelism every tensor-parallel rank has, and sends, all tokens.
    senders = 1 if layout.sequence_parallel else tensor
    sent["PP"] = passes * (layout.pipeline_parallel * layout.virtual_pipeline - 1) * senders * hidden * b
    attention = spec.layer_types.count(FULL_ATTENTION)
    if layout.cp_comm_type == "a2a":  # query, key, value and result, of the heads of other ranks
        sent["CP"] = passes * attention * 2 * (spec.size("query") + kv) * (context - 1) // context * b
    else:  # each rank gets the others' keys and values, in backward once more and with their gradients
        sent["CP"] = (3 if trained else 1) * attention * 2 * kv * (context - 1) * b
    # Gated delta nets exchange tokens for heads: the product in front, and the result.
    width = 2 * spec.size("gdn_key") + 3 * spec.size("gdn_value") + 2 * spec.gdn_value_heads
    sent["CP"] += passes * (layers - attention) * width * (context - 1) // context * b
    if spec.num_experts:
        copies = passes * layers * spec.experts_per_token * senders * hidden
        sent["EP"] = copies * 2 * (experts - 1) // experts * b  # to the experts and back
        # Ranks that share an expert gather tokens, and sum results in the router's float32.
        sent["ETP"] = copies * (layout.experts_tensor_parallel - 1) * (b + 4)
    return sent
