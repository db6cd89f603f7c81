"""Start the ranks of a run on this machine and wait for them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import multiprocessing

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import USER_ERROR, ConfigError, RladError
from rlad_megatron.models.precision import DeviceFacts, check_device
from rlad_megatron.plan.placement import has_servers
from rlad_megatron.weight_sync.shared_memory import remove_file

if TYPE_CHECKING:
    from rlad_megatron.session import Surroundings


def run_local(verb: str, config: RunConfig) -> int:
    """Run a verb (`run_rank`) on train.ranks_per_node processes of this machine; returns the exit code.

    When a rank fails the others are ended. An error of the user's is printed once, as one line; anything else
    raises with the rank's traceback.
    """
    if config.train.nodes != 1:
        raise ConfigError(f"train.nodes={config.train.nodes}: `rlad` starts the ranks of one machine; use 1 here")
    if config.rollout.nodes and has_servers(config):
        raise ConfigError(f"rollout.nodes={config.rollout.nodes}: `rlad` starts servers on this machine; use 0 here")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        multiprocessing.start_processes(
            _rank, args=(verb, config, port, errors), nprocs=config.train.ranks_per_node, start_method="spawn"
        )
    except multiprocessing.ProcessExitedException as failure:
        if errors.empty():
            raise
        # The same error reaches several ranks; one of them is enough.
        print(f"rlad: {errors.get()}", file=sys.stderr)
        return failure.exit_code
    finally:
        remove_file(config.run_dir)
    return 0


def _rank(local_rank: int, verb: str, config: RunConfig, port: int, errors) -> None:
    """Body of one rank: describe the world as torchrun would, then run the verb."""
    os.environ |= {
        "RANK": str(local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(config.train.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        run_rank(verb, config)
    except RladError as error:
        errors.put(str(error))
        sys.exit(USER_ERROR)


def run_rank(
    verb: str,
    config: RunConfig,
    surroundings: Surroundings | None = None,
    check: Callable[[RunConfig], None] | None = None,
) -> bool:
    """Join the world that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and run the verb.

    verb: "train", "sft" or "teacher_gap".
    check: made on rank 0 before anything is built; its error is raised on every rank. Where the launcher is not on
    the trainer's host it cannot make it itself.
    Returns False when the run was told to stop before its end.
    """
    from rlad_megatron import platform

    platform.setup()
    from rlad_megatron import loop  # imports Megatron-Core, which has to find its device ready
    from rlad_megatron.parallel.collective import on_first_rank
    from rlad_megatron.session import Surroundings
    from rlad_megatron.teacher.gap import teacher_gap

    check_device(config, DeviceFacts(platform.capability(), platform.cuda_version(), platform.engine_version()))
    if not platform.has_cuda():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.train.ranks_per_node))
    platform.init_process_group(config.train.distributed_timeout_s)
    if check is not None:
        on_first_rank(lambda: check(config), torch.distributed.group.WORLD)
    verbs = {"train": loop.train, "sft": loop.sft, "teacher_gap": teacher_gap}
    finished = verbs[verb](config, surroundings or Surroundings())
    torch.distributed.destroy_process_group()
    return finished
