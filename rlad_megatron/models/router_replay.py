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
    experts_LTK = experts_TLK[:, list(routers)].transpose(0, 1).to(platform.device(), non_blocking=True).long()
    for router, experts_TK in zip(routers.values(), experts_LTK, strict=True):
        router.set_target_indices(experts_TK)
        router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    yield
    for router in routers.values():
        if torch.is_grad_enabled() and _recomputes_routers(chunk.config):
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
    """By the layer's index in the whole model. A layer without experts has none."""
    return {
        layer.layer_number - 1: layer.mlp.router.router_replay
        for layer in chunk.decoder.layers
        if isinstance(layer.mlp, MoELayer) and layer.mlp.router.router_replay is not None
    }


def _recomputes_routers(config: TransformerConfig) -> bool:
    return config.recompute_granularity == "full" or (
        config.recompute_granularity == "selective" and "moe" in config.recompute_modules
    )
