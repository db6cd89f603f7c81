"""What a run costs in time: operations of a pass, products computed again, and bytes sent. Counted, not measured.

Letters: T tokens of the longest sample; b bytes of an element.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rlad_megatron.config import TrainConfig
from rlad_megatron.models.recompute import modules_of
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.plan.memory import Model, recomputed_layers

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
        count * length * sum(_layer_flops(spec, length).values()) for length, count in Counter(lengths).items()
    )
    return spec.num_layers * layers + 2 * positions * spec.hidden_size * spec.vocab_size


def recomputed_share(model: Model, train: TrainConfig, longest: int) -> float:
    """Operations that backward computes again, as a share of an update's: forward once, backward twice as much.

    longest: T. Attention is counted at that length, and the head for every token.
    """
    if train.recompute == "none":
        return 0.0
    parts, spec = _layer_flops(model.spec, longest), model.spec
    layer = sum(parts.values())
    update = UPDATE_PASSES * (spec.num_layers * layer + 2 * spec.hidden_size * spec.vocab_size)
    # Norms and activation functions are no products.
    again = layer if train.recompute == "full" else sum(parts.get(name, 0) for name in modules_of(train, spec))
    stages = range(model.layout.pipeline_parallel)
    return sum(recomputed_layers(model, stage, train) for stage in stages) * again / update


def _layer_flops(spec: ModelSpec, longest: int) -> dict[str, int]:
    """Floating-point operations of a token in a layer's forward pass, by module: two for each weight."""
    hidden, query, kv = spec.hidden_size, spec.size("query"), spec.size("kv")
    flops = {
        "products of attention": 2 * hidden * (2 * query + 2 * kv),
        "core_attn": 2 * longest * query,  # scores and values, each of half of the tokens on average
    }
    if spec.num_experts:
        flops["moe"] = 2 * hidden * (3 * spec.expert_ffn_size * spec.experts_per_token + spec.num_experts)
    else:
        flops["mlp"] = 2 * hidden * 3 * spec.ffn_size
    return flops


def sent_bytes(model: Model, *, trained: bool) -> dict[str, int]:
    """Bytes that all ranks together send for a token in a pass through the model, by kind of parallelism.

    trained: in an update, so backward too. What recompute sends again is not counted.
    """
    spec, layout, b = model.spec, model.layout, model.element_bytes
    hidden, layers, kv = spec.hidden_size, spec.num_layers, spec.size("kv")
    tensor, context, experts = layout.tensor_parallel, layout.context_parallel, layout.expert_parallel
    passes = 2 if trained else 1
    # A ring sums over the ranks, or gathers and scatters, with 2 (TP - 1) copies of the token: around attention, and
    # around a feed-forward part without experts. What sequence parallelism gathered is gathered again for the
    # gradients of weights.
    sums = 1 if spec.num_experts else 2
    again = trained and layout.sequence_parallel
    sent = {"TP": layers * sums * (2 * passes + again) * (tensor - 1) * hidden * b}
    # Without sequence parallelism every tensor-parallel rank has, and sends, all tokens.
    senders = 1 if layout.sequence_parallel else tensor
    sent["PP"] = passes * (layout.pipeline_parallel * layout.virtual_pipeline - 1) * senders * hidden * b
    if layout.cp_comm_type == "a2a":  # query, key, value and result, of the heads of other ranks
        sent["CP"] = passes * layers * 2 * (spec.size("query") + kv) * (context - 1) // context * b
    else:  # each rank gets the others' keys and values, in backward once more and with their gradients
        sent["CP"] = (3 if trained else 1) * layers * 2 * kv * (context - 1) * b
    if spec.num_experts:
        copies = passes * layers * spec.experts_per_token * senders * hidden
        sent["EP"] = copies * 2 * (experts - 1) // experts * b  # to the experts and back
        # Ranks that share an expert gather tokens, and sum results in the router's float32.
        sent["ETP"] = copies * (layout.experts_tensor_parallel - 1) * (b + 4)
    return sent
