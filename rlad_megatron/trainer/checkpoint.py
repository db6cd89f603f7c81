"""Megatron distributed checkpoints of a run: written under a temporary name, then renamed; the last few are kept.

`checkpoints/` holds `step_00000050/` (Megatron's torch_dist format) and `latest`, a file with the newest step.
A checkpoint holds model, optimizer, learning-rate schedule and random states. Its `run.json`, readable without
Megatron, holds the model's fingerprint, the layout and the loop's state (step, data position, weight version).
`digests.json` has a digest of every file, which a load compares (models/checkpoint_files.py).
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections import ChainMap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.checkpoint_files import DIGESTS, digests_of, write_digests
from rlad_megatron.models.torch_dist import read_metadata
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.trainer.actor import Actor
from rlad_megatron.trainer.run_state import (
    META,
    checkpoint_dir,
    damage_of,
    read_meta,
    remedy,
    step_of,
    steps_in,
    write_latest,
)
from rlad_megatron.trainer.torch_adam import separate_step_counts

EXPERTS = "expert_optimizer"


def save(folder: Path, step: int, actor: Actor, loop_state: dict, *, run: str, keep: int) -> None:
    """Write a checkpoint of this step. Collective. A crash at any point leaves the previous checkpoint intact.

    Args:
        folder: `checkpoints/` of the run, on a file system that all ranks share.
        loop_state: JSON data that the loop needs to continue; rank 0's is kept.
        run: the run's id. Only its checkpoints are ever removed.
        keep: number of checkpoints to keep.
    """
    target = checkpoint_dir(folder, step)
    temporary = target.with_suffix(".tmp")
    if dist.get_rank() == 0:
        for unfinished in folder.glob("step_*.tmp"):
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        dist_checkpointing.save(_state(actor, is_loading=False, with_rng=True), str(temporary))
    except CheckpointException as failure:  # torch hides the file system's error by failing again at the file's end
        cause, _ = next(iter(failure.failures.values()))
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"{temporary}: cannot be written ({_in_a_line(cause)}; {free:,} bytes are free); free some space, and "
            "continue with resume=true"
        ) from failure
    if dist.get_rank() == 0:
        (temporary / META).write_text(json.dumps(_facts(actor) | {"run": run, "loop": loop_state}, indent=2) + "\n")
    dist.barrier()
    digests: list = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digests_of(temporary, _own_files(temporary)))
    if dist.get_rank() == 0:
        write_digests(temporary, dict(ChainMap(*digests)))
        _set_aside(folder, step)
        temporary.replace(target)
        write_latest(folder, step)
        ours = [path for path in map(partial(checkpoint_dir, folder), steps_in(folder)) if _is_of(run, path)]
        for old in ours[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def _own_files(folder: Path) -> list[str]:
    """The checkpoint's files that this rank has written, so that it reads them from its host's memory."""
    of_rank = {path.name: re.match(r"__(\d+)_", path.name) for path in folder.iterdir() if path.is_file()}
    return [name for name, found in of_rank.items() if int(found[1] if found else 0) == dist.get_rank()]


def _set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints of this step and later ones: the run was resumed from an earlier one."""
    for later in [number for number in steps_in(folder) if number >= step]:
        path = checkpoint_dir(folder, later)
        names = (path.with_suffix(f".abandoned{count}") for count in itertools.count(1))
        target = next(name for name in names if not name.exists())
        path.rename(target)
        print(f"{path} is from before this resume; it is now {target}", flush=True)


def _is_of(run: str, checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / META).read_text()).get("run") == run
    except (OSError, ValueError):
        return False


def load(source: Path, actor: Actor) -> dict:
    """Restore a checkpoint into `actor` and return its `run.json`. Collective.

    Raises:
        CheckpointError: a file is damaged, or other layers wrote the checkpoint.
    """
    _check_digests(source)
    read_metadata(source)  # Megatron's own reader would run whatever is pickled there
    meta, facts = read_meta(source), _facts(actor)
    saved, ours = meta.get("layers", "local"), facts["layers"]
    if saved != ours:
        raise CheckpointError(
            f"student.transformer_impl={ours}, but {source} was saved with {saved}; Transformer "
            f"Engine's layers have states that the others lack, so resume with student.transformer_impl={saved}"
        )
    # Random states belong to model-parallel ranks; under another layout they start fresh.
    with_rng = meta["layout"] == facts["layout"]
    try:
        state = dist_checkpointing.load(_state(actor, is_loading=True, with_rng=with_rng), str(source))
    except (Exception, CheckpointException) as error:  # damaged archives, if there are no digests, raise anything
        raise CheckpointError(f"{source}: Megatron-Core cannot load it ({_in_a_line(error)})") from error
    for name, chunk in _chunks(actor).items():
        chunk.load_state_dict(state[name])
    betas = actor.optimizer.param_groups[0]["betas"]
    _load_optimizer(actor.optimizer, state)
    for group in actor.optimizer.param_groups:
        group["betas"] = betas  # from the configuration, not from the checkpoint
    separate_step_counts(actor.optimizer)
    actor.scheduler.load_state_dict(state["scheduler"])
    if with_rng:
        for name, (_, restore) in _random_states().items():
            restore(state["rng"][name])
    return meta


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _check_digests(source: Path) -> None:
    """Raise CheckpointError on every rank if a file is damaged. The ranks share the files."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, damage_of(source, (dist.get_rank(), len(found))))
    damage = next(filter(None, found), None)
    if damage:
        raise CheckpointError(
            on_first_rank(lambda: f"{damage}; {remedy(source.parent, step_of(source))}", dist.group.WORLD)
        )
    if dist.get_rank() == 0 and not (source / DIGESTS).exists():
        print(f"{source} has no {DIGESTS}: its files were not checked", flush=True)


def _facts(actor: Actor) -> dict[str, Any]:
    """What a checkpoint says of its model. "layers" is `student.transformer_impl` with auto resolved."""
    layout, layers = [actor.groups.tp_size, actor.groups.pp_size], unwrap_model(actor.chunks[0]).config.transformer_impl
    return {"model": actor.model_fingerprint, "layout": layout, "layers": layers}


def _state(actor: Actor, *, is_loading: bool, with_rng: bool) -> dict:
    """Megatron's sharded state dict: this rank's shards, and the state that all ranks have in common."""
    groups = actor.groups
    # This format loads in other layouts than it was saved in.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.collection.dp_cp}
    chunks = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _chunks(actor).items()}
    optimizers = {
        name: part.sharded_state_dict(chunks, is_loading=is_loading, metadata=metadata)
        for name, part in _optimizers(actor.optimizer).items()
    }
    if EXPERTS in optimizers:
        # What is not a tensor is the same for both, and a layout that does not deal experts over ranks has one only.
        optimizers[EXPERTS] = {"param_state": optimizers[EXPERTS]["param_state"]}
    if not is_loading:
        force_all_tensors_to_non_fp8(chunks)  # the optimizer's state holds the unrounded values
    state = {**chunks, **optimizers, "scheduler": actor.scheduler.state_dict()}
    if with_rng:
        states = {name: get() for name, (get, _) in _random_states().items()}
        sizes, ranks = (groups.pp_size, groups.tp_size), (groups.pp_rank, groups.tp_rank)
        state["rng"] = ShardedObject("rng", states, sizes, ranks, replica_id=groups.place.copy_rank)
    return state


def _chunks(actor: Actor) -> dict[str, GPTModel]:
    """The model chunks by their names in a state. The tensors' keys in the file hold for every layout."""
    return {f"model{index}": chunk for index, chunk in enumerate(unwrap_model(actor.chunks))}


def _optimizers(optimizer: MegatronOptimizer) -> dict[str, DistributedOptimizer]:
    """Megatron's optimizer, and the second one that it has for experts which are dealt over ranks."""
    return dict(zip(("optimizer", EXPERTS), optimizer.chained_optimizers, strict=False))


def _load_optimizer(optimizer: MegatronOptimizer, state: dict) -> None:
    for name, part in _optimizers(optimizer).items():
        common = state["optimizer"]
        if name == EXPERTS:
            groups = [group | {"is_expert_parallel": True} for group in common["optimizer"]["param_groups"]]
            common = common | state[EXPERTS] | {"optimizer": common["optimizer"] | {"param_groups": groups}}
        part.load_state_dict(common)


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
