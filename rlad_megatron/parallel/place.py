"""Which part of a model a rank holds, and which copy of it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from rlad_megatron.config import LayoutConfig


@dataclass(frozen=True)
class Place:
    """A rank's place in a layout. Experts have tensor- and data-parallel ranks of their own."""

    tp_rank: int = 0
    pp_rank: int = 0
    copy_rank: int = 0  # number of the copy of what is not an expert, over data- and context-parallel ranks
    ep_rank: int = 0
    expert_tp_rank: int = 0
    expert_dp_rank: int = 0


def place_of(rank: int, layout: LayoutConfig, world_size: int) -> Place:
    """The place of a rank in Megatron's order: TP fastest, then CP, DP, PP; for experts ETP, EP, their DP, PP.

    Source: megatron/core/parallel_state.py:initialize_model_parallel, `order`.
    """
    pp_rank, rank = divmod(rank, world_size // layout.pipeline_parallel)
    copy_rank, tp_rank = divmod(rank, layout.tensor_parallel)
    rest, expert_tp_rank = divmod(rank, layout.experts_tensor_parallel)
    expert_dp_rank, ep_rank = divmod(rest, layout.expert_parallel)
    return Place(tp_rank, pp_rank, copy_rank, ep_rank, expert_tp_rank, expert_dp_rank)
