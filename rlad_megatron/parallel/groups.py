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
from rlad_megatron.parallel.place import Place


@dataclass(frozen=True)
class ModelGroups:
    """This rank's place in one model's layout."""

    collection: ProcessGroupCollection
    place: Place
    vp_size: int  # model chunks on this rank

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def tp_rank(self) -> int:
        return self.place.tp_rank

    @property
    def tp_size(self) -> int:
        return self.collection.tp.size()

    @property
    def pp_rank(self) -> int:
        return self.place.pp_rank

    @property
    def pp_size(self) -> int:
        return self.collection.pp.size()

    @property
    def cp_rank(self) -> int:
        return self.collection.cp.rank()

    @property
    def cp_size(self) -> int:
        return self.collection.cp.size()

    @property
    def dp_rank(self) -> int:
        return self.collection.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.collection.dp.size()

    @property
    def microbatch_multiple(self) -> int:
        """Micro-batches of a pass are a multiple of this: Megatron's interleaved schedule takes as many as stages."""
        return self.pp_size if self.vp_size > 1 else 1

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
        layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.experts_tensor_parallel,
        distributed_timeout_minutes=timeout_s / 60,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    place = Place(
        tp_rank=collection.tp.rank(),
        pp_rank=collection.pp.rank(),
        copy_rank=collection.dp_cp.rank(),
        ep_rank=collection.ep.rank(),
        expert_tp_rank=collection.expt_tp.rank(),
        expert_dp_rank=collection.expt_dp.rank(),
    )
    return ModelGroups(collection, place, layout.virtual_pipeline)


def seed_everything(seed: int, groups: ModelGroups) -> None:
    """Seed torch and Megatron's tracked generators, which differ by tensor-parallel rank where they must."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * groups.pp_rank)
