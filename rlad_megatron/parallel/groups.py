"""The process groups of a model's layout, as explicit objects.

Teacher and student may have different layouts over the same ranks, so other modules take a `ModelGroups` instead of
asking Megatron's global parallel state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from rlad_megatron.config import LayoutConfig


@dataclass(frozen=True)
class ModelGroups:
    """This rank's place in one model's layout."""

    collection: ProcessGroupCollection
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int

    @property
    def copy_rank(self) -> int:
        """The number of this rank's copy of the weights, over data- and context-parallel ranks."""
        return self.collection.dp_cp.rank()

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def reports(self) -> bool:
        """True on the ranks that report per-token results: over all of them, each token is reported once."""
        return self.is_last_stage and self.tp_rank == 0


def build_groups(layout: LayoutConfig, timeout_s: float = 1800.0) -> ModelGroups:
    """Create the process groups of `layout` over all ranks. Collective.

    timeout_s: of their collectives; the world's does not hold for them.

    Megatron's global state describes the layout built last. Some of Megatron's training code still reads it, so build
    the student's groups after the teacher's.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()  # clears the global state; existing groups keep working
    parallel_state.initialize_model_parallel(
        layout.tensor_parallel,
        layout.pipeline_parallel,
        context_parallel_size=layout.context_parallel,
        distributed_timeout_minutes=timeout_s / 60,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return ModelGroups(
        collection,
        tp_rank=collection.tp.rank(),
        tp_size=collection.tp.size(),
        pp_rank=collection.pp.rank(),
        pp_size=collection.pp.size(),
        cp_rank=collection.cp.rank(),
        cp_size=collection.cp.size(),
        dp_rank=collection.dp.rank(),
        dp_size=collection.dp.size(),
    )


def seed_everything(seed: int, groups: ModelGroups) -> None:
    """Seed torch and Megatron's tracked generators, which differ by tensor-parallel rank where they must."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * groups.pp_rank)
