"""Router replay: a forward pass in which each token goes to given experts, with the router's own weights for them.

Done by Megatron-Core's RouterReplay (moe/router_replay.py), one in each router of a model that is built for it
(`transformer_config`); a teacher has none. Megatron's static methods address all models of the process, so these
functions address a chunk's routers instead.

Shape letters: T tokens of this rank's micro-batch, L layers of the whole model, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from rlad_megatron import platform


@contextmanager
def replayed(chunk: GPTModel, experts_TLK: torch.Tensor | None, tp: dist.ProcessGroup) -> Iterator[None]:
    """Within the context, a forward pass of the chunk sends tokens to these experts; None: to those of its choice.

    experts_TLK: integers on the CPU; K different ones for each token and layer, and anything for layers without a
    router. Models that are not built for replay always choose.

    Layers that are recomputed route again in the backward pass, which comes after later forward passes if there are
    pipeline stages. The context leaves them set to take the choices of earlier passes, the oldest first: in Megatron's
    schedules the micro-batches of a chunk go backward in the order in which they went forward.
    """
    routers = _routers(chunk)
    if experts_TLK is None or not routers:
        yield
        return
    if chunk.config.sequence_parallel:
        experts_TLK = experts_TLK.chunk(tp.size())[tp.rank()]  # a router sees its rank's share of the tokens
    for layer, router in routers.items():
        # A tensor of its own, which is freed when its layer has been recomputed.
        router.set_target_indices(experts_TLK[:, layer].to(platform.device(), torch.long, copy=True))
        router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    yield
    for number, router in enumerate(routers.values()):
        if torch.is_grad_enabled() and _recomputes_router(chunk.config, number):
            router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
        else:
            router.clear_indices()  # or every micro-batch's would be kept


def stop_replay(chunks: Iterable[GPTModel]) -> None:
    """After the last pass: routers choose again."""
    for chunk in chunks:
        for router in _routers(chunk).values():
            router.clear_indices()
            router.clear_router_replay_action()


def _routers(chunk: GPTModel) -> dict[int, RouterReplay]:
    """By the layer's index in the whole model. All layers have experts, or none has."""
    return {
        layer.layer_number - 1: layer.mlp.router.router_replay
        for layer in chunk.decoder.layers
        if isinstance(layer.mlp, MoELayer) and layer.mlp.router.router_replay is not None
    }


def _recomputes_router(config: TransformerConfig, number: int) -> bool:
    """Whether backward recomputes the router of this layer, counted within its chunk."""
    if config.recompute_granularity == "full":
        return config.recompute_method == "uniform" or number < config.recompute_num_layers
    return config.recompute_granularity == "selective" and "moe" in config.recompute_modules
