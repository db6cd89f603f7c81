"""Run the ranks of a run on this machine."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.placement import place, with_role
from rlad_megatron.errors import ConfigError, RankError, RladError, TeacherError, TrainingError
from rlad_megatron.launch.heartbeat import heartbeat, silent_ranks
from rlad_megatron.launch.ranks import Ended, Ranks, log_of, wait_for_any
from rlad_megatron.launch.scratch import scratch
from rlad_megatron.launch.stop import stop_signals
from rlad_megatron.models.precision import DeviceFacts, check_device
from rlad_megatron.parallel.ports import PORTS, free_port
from rlad_megatron.processes import quick_imports
from rlad_megatron.servers.process import HOST
from rlad_megatron.servers.transfer.choice import IPC, choose_transfer
from rlad_megatron.servers.transfer.weights_file import all_files, in_memory, remove
from rlad_megatron.teacher.client import TeacherAddress

if TYPE_CHECKING:
    from rlad_megatron.run import LauncherHooks

TEACHER_VERBS = ("teacher_gap", "bench_teacher")  # only the teacher has ranks
POLL_S = 1.0
SETTLE_S = 0.5  # after a failure, for its cause to be seen too
OUTPUT = "see its output above, and the machine's memory"
# Files in the scratch folder.
TRAINING = "training"  # by a rank: the run has begun to train, so it can stop by itself
STOP = "stop"  # by the launcher, which asks it to


def run_local(verb: str, config: RunConfig) -> int:
    """Run a verb (see `run_rank`) on the trainer's and a dedicated teacher's ranks; returns the exit code.

    When a rank fails, or ends before it has finished, the others are killed. After SIGINT or SIGTERM the run saves its
    last whole step and ends with the code that a shell reports for the signal.

    Raises:
        RladError: the failure.
        Interrupted: a signal while there was nothing to save, or the second one.
    """
    if config.train.gpus_per_node and not platform.has_cuda():
        raise ConfigError(
            f"train.gpus_per_node={config.train.gpus_per_node}, but torch finds no GPU on this machine; "
            "use train.gpus_per_node=0 for a run on CPUs"
        )
    tasks = place(config)
    world = place(config, only="teacher") if verb in TEACHER_VERBS else with_role(tasks, "trainer")
    with ExitStack() as stack:
        is_writer = verb in ("train", "bench")  # others may read the folder of a run that is still going
        folder = stack.enter_context(scratch(in_memory(config.run_dir) if is_writer else ()))
        stack.callback(remove, all_files(config.run_dir) if is_writer else ())
        signals = stack.enter_context(stop_signals(partial(_ask_to_stop, folder, config)))
        seed = secrets.randbelow(len(PORTS))
        trainer_port, teacher_port = (free_port(HOST, seed + part) for part in (0, len(PORTS) // 2))
        token = secrets.token_hex(32)  # of a teacher on dedicated ranks; a fleet makes that of its servers
        address, publish = multiprocessing.get_context("spawn").Pipe(duplex=False)

        def start(ranks: Ranks) -> Ranks:
            stack.callback(ranks.kill)
            return ranks

        logs = config.run_dir / "logs"
        trainer = start(Ranks(world, HOST, trainer_port, logs, partial(_train, verb, config, folder, address)))
        worlds = [trainer]
        if is_writer and config.teacher_is_dedicated:
            teachers, teach = with_role(tasks, "teacher"), partial(_teach, config, publish, token)
            # First in the list: when the teacher fails, the trainer fails too, and the cause is to be shown.
            worlds.insert(0, start(Ranks(teachers, HOST, teacher_port, logs, teach)))
        finished = True
        while trainer.running:
            wait_for_any(worlds, POLL_S)
            ended = [(ranks, rank) for ranks in worlds for rank in ranks.ended()]
            if any(rank.failed for _, rank in ended):
                time.sleep(SETTLE_S)
                ended += [(ranks, rank) for ranks in worlds for rank in ranks.ended()]
                failed = [(ranks is trainer, rank) for ranks, rank in ended if rank.failed]
                raise _failure(failed, logs, silent_ranks(folder, range(len(world))))
            finished &= all(rank.finished for _, rank in ended)
        return 0 if finished or signals.first is None else 128 + signals.first


def _ask_to_stop(folder: Path, config: RunConfig) -> bool:
    if not (folder / TRAINING).exists():
        return False
    (folder / STOP).touch()
    print(
        f"rlad: stopping; the step at hand has {config.train.stop_grace_s:g} s (train.stop_grace_s) to end, and is "
        "dropped otherwise; again, to end at once",
        file=sys.stderr,
        flush=True,
    )
    return True


def _failure(failed: Sequence[tuple[bool, Ended]], logs: Path, silent: str = "") -> RladError:
    """The error of the rank that is most likely the cause.

    failed: (whether it is the trainer's, how it ended). silent: who has given no sign of life; NCCL's watchdog ends the
    others without a word.
    """

    def order(pair: tuple[bool, Ended]) -> tuple:
        of_trainer, ended = pair
        # What a rank says of itself, then a rank that says nothing, then one that may only have lost that one.
        return of_trainer, not ended.error, bool(ended.bug), "by peer" in ended.bug

    of_trainer, ended = min(failed, key=order)
    if ended.error:
        return RladError(ended.error)
    name = f"rank {ended.rank}" + ("" if of_trainer else " of the teacher")
    if ended.bug:
        return RankError(f"{name} failed: {ended.bug}")
    if of_trainer:
        return TrainingError(f"{name} {ended.how}; {silent or OUTPUT}")
    log = log_of(logs, "teacher", ended.rank)
    return TeacherError(f"{name} {ended.how}; see {log}, and the machine's memory")


def _train(verb: str, config: RunConfig, folder: Path, address: Connection, rank: int) -> bool:
    from rlad_megatron.run import LauncherHooks

    def find_teacher() -> TeacherAddress:
        timeout_s = config.rollout.startup_timeout_s
        if address.poll(timeout_s):
            return address.recv()
        raise TeacherError(
            f"waited {timeout_s:g} s (rollout.startup_timeout_s) for the teacher's ranks; see "
            f"{log_of(config.run_dir / 'logs', 'teacher', 0)}, or raise the timeout"
        )

    def stop_requested() -> bool:
        (folder / TRAINING).touch()
        return (folder / STOP).exists()

    def drop_requested() -> bool:
        file = folder / STOP
        return file.exists() and time.time() - file.stat().st_mtime > config.train.stop_grace_s

    hooks = LauncherHooks(find_teacher, stop_requested=stop_requested, drop_requested=drop_requested)
    return run_rank(verb, config, hooks, folder)


def _teach(config: RunConfig, publish: Connection, token: str, rank: int) -> bool:
    """Its output goes to a log; the terminal is the trainer's."""
    path = log_of(config.run_dir / "logs", "teacher", rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    run_teacher_rank(config, HOST, lambda url: publish.send(TeacherAddress(url, str(path), token)), token)
    return True


def run_rank(
    verb: str,
    config: RunConfig,
    hooks: LauncherHooks,
    folder: Path,
    check: Callable[[RunConfig], None] | None = None,
) -> bool:
    """Join the world that the environment describes (`set_rank_environment`) and run the verb.

    verb: "train", "sft", "teacher_gap", "bench" or "bench_teacher". folder: for signs of life; all ranks see it.
    check: runs on rank 0 before anything is built, for launchers on another host; every rank raises its error.

    Returns False when the run was told to stop before its end.
    """
    with quick_imports():
        _join_world(config)
        from rlad_megatron import bench, loop
        from rlad_megatron.parallel.collective import on_first_rank
        from rlad_megatron.teacher.gap import teacher_gap

    if platform.has_cuda() and torch.distributed.get_rank() == 0 and (line := cudnn_line(platform.loaded_cudnn())):
        print(line, flush=True)
    if check is not None:
        on_first_rank(lambda: check(config), torch.distributed.group.WORLD)
    verbs: dict[str, Callable[[RunConfig, LauncherHooks], bool]] = {
        "train": loop.train,
        "sft": loop.sft,
        "teacher_gap": teacher_gap,
        "bench": bench.bench,
        "bench_teacher": bench.bench_teacher,
    }
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with heartbeat(folder, rank, world_size, config.train.distributed_timeout_s):
        finished = verbs[verb](config, hooks)
    torch.distributed.destroy_process_group()
    return finished


def run_teacher_rank(config: RunConfig, host: str, publish: Callable[[str], None], token: str) -> None:
    """Join the teacher's world, which the environment describes as for `run_rank`, and answer until it is ended.

    host: address that rank 0 listens on. publish: called on rank 0 with the URL when the teacher is ready.
    token: the secret to ask for.
    """
    with quick_imports():
        _join_world(config)
        from rlad_megatron.teacher.service import serve_teacher

    serve_teacher(config, host, publish, token)


def cudnn_line(loaded: Sequence[str]) -> str:
    """What to tell about the cuDNN libraries that a rank has loaded; empty if there is none."""
    if len(loaded) > 1:
        return (
            f"cuDNN: two of them are loaded, {' and '.join(loaded)}, and calls can fail; set CUDNN_HOME to the folder "
            "nvidia/cudnn of this Python's packages and put its lib first in LD_LIBRARY_PATH"
        )
    return f"cuDNN: {loaded[0]}" if loaded else ""


def _join_world(config: RunConfig) -> None:
    """Set up the device, which Megatron-Core needs when it is imported, and the process group."""
    if choose_transfer(config, platform.has_cuda()).backend != IPC:
        platform.use_expandable_segments()
    platform.setup()
    check_device(
        config, DeviceFacts(platform.capability(), platform.cuda_version(), platform.transformer_engine_version())
    )
    if not platform.has_cuda():
        torch.set_num_threads(platform.cores_of_rank(int(os.environ["LOCAL_WORLD_SIZE"])))
    platform.init_process_group(config.train.distributed_timeout_s)
