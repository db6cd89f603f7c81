"""Megatron distributed checkpoints of a run: written to a temporary name, renamed, the last few kept.

Layout of `checkpoints/`: `step_00000050/` (Megatron's torch_dist format) and `latest`, a file that holds the step.
Saved: model, optimizer, learning-rate schedule, random states; and in `run.json`, readable without Megatron, the
model's fingerprint, the layout and the loop's own state (step, data position, weight version).
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
from rlad_megatron.trainer.run_state import META, checkpoint_dir, latest_step, read_meta
from rlad_megatron.trainer.torch_adam import separate_step_counts

# Loads under another number of tensor-, pipeline- or data-parallel ranks than it was saved under.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(folder: Path, step: int, actor: Actor, loop_state: dict, *, keep: int) -> None:
    """Write a checkpoint of this step. Collective; a crash at any point leaves the previous one in place.

    Args:
        folder: `checkpoints/` of the run, on a file system that all ranks share.
        loop_state: what the loop needs to go on; JSON data, the same on every rank.
        keep: newest checkpoints to keep.
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
            "layers": _layers(actor),
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
        # Later ones belong to a branch that was given up by resuming from before them.
        later = [path for path in complete if path > target]
        for old in [*later, *[path for path in complete if path <= target][:-keep]]:
            shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, actor: Actor) -> dict:
    """Restore the newest checkpoint into `actor` and return the loop's state. Collective.

    Raises:
        CheckpointError: the layers that wrote it are not those that would read it.
    """
    meta = read_meta(folder)
    if meta.get("layers", "local") != _layers(actor):
        raise CheckpointError(
            f"the checkpoint in {folder} is of student.transformer_impl={meta.get('layers', 'local')}, and Transformer "
            f"Engine's layers save states that the others have not; resume with that, not with {_layers(actor)}"
        )
    # Every model-parallel rank has its own random state; under another layout they start afresh.
    with_rng = meta["layout"] == _layout(actor)
    source = checkpoint_dir(folder, latest_step(folder))
    state = dist_checkpointing.load(_state(actor, is_loading=True, with_rng=with_rng), str(source))
    unwrap_model(actor.model).load_state_dict(state["model"])
    betas = actor.optimizer.param_groups[0]["betas"]
    actor.optimizer.load_state_dict(state["optimizer"])
    for group in actor.optimizer.param_groups:
        group["betas"] = betas  # on resume the configuration decides
    separate_step_counts(actor.optimizer)
    actor.scheduler.load_state_dict(state["scheduler"])
    if with_rng:
        _restore_rng(state["rng"])
    return meta["loop"]


def _layout(actor: Actor) -> list[int]:
    return [actor.groups.tp_size, actor.groups.pp_size]


def _layers(actor: Actor) -> str:
    """What the layers are made of, as in `student.transformer_impl` but never auto."""
    return unwrap_model(actor.model).config.transformer_impl


def _state(actor: Actor, *, is_loading: bool, with_rng: bool) -> dict:
    """Megatron's sharded state dict: what each rank owns of every tensor, and the common rest."""
    groups = actor.groups
    metadata = {**_OPTIMIZER_FORMAT, "dp_cp_group": groups.collection.dp_cp}
    model = unwrap_model(actor.model).sharded_state_dict(metadata=metadata)
    state = {
        "model": model,
        "optimizer": actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        "scheduler": actor.scheduler.state_dict(),
    }
    if not is_loading:
        force_all_tensors_to_non_fp8(model)  # the optimizer's state holds what they are rounded from
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
