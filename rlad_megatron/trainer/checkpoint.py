"""Megatron distributed checkpoints of a run: written under a temporary name, then renamed; the last few are kept.

`checkpoints/` holds `step_00000050/` (Megatron's torch_dist format) and `latest`, a file with the newest step.
A checkpoint holds model, optimizer, learning-rate schedule and random states. Its `run.json`, readable without
Megatron, holds the model's fingerprint, the layout and the loop's state (step, data position, weight version).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

from rlad_megatron.errors import CheckpointError
from rlad_megatron.trainer.actor import Actor
from rlad_megatron.trainer.run_state import META, checkpoint_dir, read_latest
from rlad_megatron.trainer.torch_adam import separate_step_counts

# This format loads under other tensor-, pipeline- and data-parallel sizes than it was saved with.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(folder: Path, step: int, actor: Actor, loop_state: dict, *, keep: int) -> None:
    """Write a checkpoint of this step. Collective. A crash at any point leaves the previous checkpoint intact.

    Args:
        folder: `checkpoints/` of the run, on a file system that all ranks share.
        loop_state: JSON data that the loop needs to continue, the same on every rank.
        keep: number of checkpoints to keep.
    """
    target = checkpoint_dir(folder, step)
    temporary = target.with_suffix(".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_state(actor, is_loading=False, with_rng=True), str(temporary))
    dist.barrier()
    if dist.get_rank() == 0:
        meta = {
            "model": actor.model_fingerprint,
            "layout": _layout(actor),
            "layers": _transformer_impl(actor),
            "loop": loop_state,
        }
        (temporary / META).write_text(json.dumps(meta, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        tracker = folder / "latest.tmp"
        tracker.write_text(str(step))
        os.replace(tracker, folder / "latest")
        complete = sorted(path for path in folder.glob("step_*") if path.suffix != ".tmp")
        newest = complete.index(target) + 1
        # Later checkpoints were abandoned: the run was resumed from an earlier one.
        for old in complete[: max(newest - keep, 0)] + complete[newest:]:
            shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, actor: Actor) -> dict:
    """Restore the newest checkpoint into `actor` and return the loop's state. Collective.

    Raises:
        CheckpointError: other layers wrote the checkpoint.
    """
    source, meta = read_latest(folder)
    saved, ours = meta.get("layers", "local"), _transformer_impl(actor)
    if saved != ours:
        raise CheckpointError(
            f"student.transformer_impl={ours}, but the checkpoint in {folder} was saved with {saved}; Transformer "
            f"Engine's layers have states that the others lack, so resume with student.transformer_impl={saved}"
        )
    # Random states belong to model-parallel ranks; under another layout they start fresh.
    with_rng = meta["layout"] == _layout(actor)
    state = dist_checkpointing.load(_state(actor, is_loading=True, with_rng=with_rng), str(source))
    unwrap_model(actor.model).load_state_dict(state["model"])
    betas = actor.optimizer.param_groups[0]["betas"]
    actor.optimizer.load_state_dict(state["optimizer"])
    for group in actor.optimizer.param_groups:
        group["betas"] = betas  # from the configuration, not from the checkpoint
    separate_step_counts(actor.optimizer)
    actor.scheduler.load_state_dict(state["scheduler"])
    if with_rng:
        _restore_rng(state["rng"])
    return meta["loop"]


def _layout(actor: Actor) -> list[int]:
    return [actor.groups.tp_size, actor.groups.pp_size]


def _transformer_impl(actor: Actor) -> str:
    """`student.transformer_impl` with auto resolved."""
    return unwrap_model(actor.model).config.transformer_impl


def _state(actor: Actor, *, is_loading: bool, with_rng: bool) -> dict:
    """Megatron's sharded state dict: this rank's shards, and the state that all ranks have in common."""
    groups = actor.groups
    metadata = {**_OPTIMIZER_FORMAT, "dp_cp_group": groups.collection.dp_cp}
    model = unwrap_model(actor.model).sharded_state_dict(metadata=metadata)
    state = {
        "model": model,
        "optimizer": actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        "scheduler": actor.scheduler.state_dict(),
    }
    if not is_loading:
        force_all_tensors_to_non_fp8(model)  # the optimizer's state holds the unrounded values
    if with_rng:
        state["rng"] = ShardedObject(
            "rng",
            _rng(),
            (groups.pp_size, groups.tp_size),
            (groups.pp_rank, groups.tp_rank),
            replica_id=groups.dp_rank,
        )
    return state


def _rng() -> dict:
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _restore_rng(state: dict) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
