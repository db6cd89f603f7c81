"""Megatron distributed checkpoints of a run: written under a temporary name, then renamed; the last few are kept.

`checkpoints/` holds `step_00000050/` (Megatron's torch_dist format) and `latest`, a file with the newest step.
A checkpoint holds model, optimizer, learning-rate schedule and random states. Its `run.json`, readable without
Megatron, holds the model's fingerprint, the layout and the loop's state (step, data position, weight version).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        (temporary / META).write_text(json.dumps(_facts(actor) | {"loop": loop_state}, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
        tracker = folder / "latest.tmp"
        tracker.write_text(str(step))
        tracker.replace(folder / "latest")
        complete = sorted(folder.glob("step_*[0-9]"))
        # Later checkpoints were abandoned: the run was resumed from an earlier one.
        kept = [path for path in complete if path <= target][-keep:]
        for old in {*complete} - {*kept}:
            shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, actor: Actor) -> dict:
    """Restore the newest checkpoint into `actor` and return the loop's state. Collective.

    Raises:
        CheckpointError: other layers wrote the checkpoint.
    """
    source, meta = read_latest(folder)
    facts = _facts(actor)
    saved, ours = meta.get("layers", "local"), facts["layers"]
    if saved != ours:
        raise CheckpointError(
            f"student.transformer_impl={ours}, but the checkpoint in {folder} was saved with {saved}; Transformer "
            f"Engine's layers have states that the others lack, so resume with student.transformer_impl={saved}"
        )
    # Random states belong to model-parallel ranks; under another layout they start fresh.
    with_rng = meta["layout"] == facts["layout"]
    state = dist_checkpointing.load(_state(actor, is_loading=True, with_rng=with_rng), str(source))
    unwrap_model(actor.model).load_state_dict(state["model"])
    betas = actor.optimizer.param_groups[0]["betas"]
    actor.optimizer.load_state_dict(state["optimizer"])
    for group in actor.optimizer.param_groups:
        group["betas"] = betas  # from the configuration, not from the checkpoint
    separate_step_counts(actor.optimizer)
    actor.scheduler.load_state_dict(state["scheduler"])
    if with_rng:
        for name, (_, restore) in _random_states().items():
            restore(state["rng"][name])
    return meta["loop"]


def _facts(actor: Actor) -> dict[str, Any]:
    """What a checkpoint says of its model. "layers" is `student.transformer_impl` with auto resolved."""
    layout, layers = [actor.groups.tp_size, actor.groups.pp_size], unwrap_model(actor.model).config.transformer_impl
    return {"model": actor.model_fingerprint, "layout": layout, "layers": layers}


def _state(actor: Actor, *, is_loading: bool, with_rng: bool) -> dict:
    """Megatron's sharded state dict: this rank's shards, and the state that all ranks have in common."""
    groups = actor.groups
    # This format loads under other tensor-, pipeline- and data-parallel sizes than it was saved with.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.collection.dp_cp}
    model = unwrap_model(actor.model).sharded_state_dict(metadata=metadata)
    state = {
        "model": model,
        "optimizer": actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        "scheduler": actor.scheduler.state_dict(),
    }
    if not is_loading:
        force_all_tensors_to_non_fp8(model)  # the optimizer's state holds the unrounded values
    if with_rng:
        states = {name: get() for name, (get, _) in _random_states().items()}
        sizes, ranks = (groups.pp_size, groups.tp_size), (groups.pp_rank, groups.tp_rank)
        state["rng"] = ShardedObject("rng", states, sizes, ranks, replica_id=groups.dp_rank)
    return state


def _random_states() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    """How to get and set each random state."""
    tracker = get_cuda_rng_tracker()
    return {
        "python": (random.getstate, random.setstate),
        "numpy": (numpy.random.get_state, numpy.random.set_state),
        "torch": (torch.get_rng_state, torch.set_rng_state),
        "cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
        "tracker": (tracker.get_states, tracker.set_states),
    }
