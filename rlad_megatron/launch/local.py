"""Run the ranks of a run on this machine."""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import secrets
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import connection, resource_tracker
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import multiprocessing

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.placement import Task, place, with_role
from rlad_megatron.errors import USER_ERROR, ConfigError, RladError, TeacherError, TrainingError
from rlad_megatron.launch.rendezvous import set_rank_environment
from rlad_megatron.models.precision import DeviceFacts, check_device
from rlad_megatron.parallel.ports import PORTS, free_port
from rlad_megatron.servers.process import HOST
from rlad_megatron.servers.transfer.weights_file import possible_files, remove
from rlad_megatron.teacher.client import TeacherAddress

if TYPE_CHECKING:
    from rlad_megatron.run import LauncherHooks

END_S = 10.0  # between SIGTERM and SIGKILL
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def run_local(verb: str, config: RunConfig) -> int:
    """Run a verb (see `run_rank`) on the trainer's and a dedicated teacher's ranks; returns the exit code.

    When a rank fails, the others are ended. A user error is printed once, as one line; anything else raises with the
    rank's traceback.
    """
    if config.train.gpus_per_node and not platform.has_cuda():
        raise ConfigError(
            f"train.gpus_per_node={config.train.gpus_per_node}, but torch finds no GPU on this machine; "
            "use train.gpus_per_node=0 for a run on CPUs"
        )
    context = multiprocessing.get_context("spawn")
    errors, teacher_address = context.SimpleQueue(), context.Queue()
    seed = secrets.randbelow(len(PORTS))
    trainer_port, teacher_port = (free_port(HOST, seed + part) for part in (0, len(PORTS) // 2))
    tasks = place(config)
    world = place(config, only="teacher") if verb == "teacher_gap" else with_role(tasks, "trainer")
    # It logs that it ends the other ranks, which would hide the cause.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            if verb == "train":  # the other verbs may read the folder of a run that is still going
                stack.callback(remove, possible_files(config.run_dir))
            stack.enter_context(no_orphans_left())
            groups = [_start(stack, world, trainer_port, errors, partial(_train, verb, config, teacher_address))]
            if verb == "train" and config.teacher_is_dedicated:
                teach = partial(_teach, config, teacher_address)
                # First in the list: when the teacher fails, the trainer fails too, and the cause is to be shown.
                groups.insert(0, _start(stack, with_role(tasks, "teacher"), teacher_port, errors, teach))
            while groups[-1].sentinels:  # until the trainer has ended; raises the first failure, the teacher's first
                connection.wait([sentinel for group in groups for sentinel in group.sentinels])
                for group in groups:
                    group.join(timeout=0)
    except multiprocessing.ProcessExitedException as failure:
        if not errors.empty():
            # The same error reaches several ranks; print it once.
            print(f"rlad: {errors.get()}", file=sys.stderr)
            return USER_ERROR
        # Without an exception: it was killed, or crashed outside Python.
        rank, ended = failure.error_index, f"ended ({failure.msg}); see"
        if failure.error_pid in groups[-1].pids():
            raise TrainingError(f"rank {rank} {ended} its output above, and the machine's memory") from failure
        log = _teacher_log(config, rank)
        raise TeacherError(f"rank {rank} of the teacher {ended} {log}, and the machine's memory") from failure
    return 0


@contextmanager
def no_orphans_left() -> Iterator[None]:
    """At exit, end the processes that ranks have left behind.

    The process of Megatron's checkpoint writer survives when its rank is killed. As a subreaper, this process becomes
    its parent. SIGTERM raises SystemExit here, so that the clean-up runs.
    """

    def leave(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the clean-up
        sys.exit(128 + signum)

    prctl = ctypes.CDLL(None).prctl
    resource_tracker.ensure_running()  # a child of this process too, which must stay
    before = psutil.Process().children(recursive=True)
    handler = signal.signal(signal.SIGTERM, leave)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        left = [process for process in psutil.Process().children(recursive=True) if process not in before]
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    end(process)
            _, left = psutil.wait_procs(left, timeout=END_S)
        prctl(PR_SET_CHILD_SUBREAPER, 0)
        signal.signal(signal.SIGTERM, handler)


def _start(stack: ExitStack, world: tuple[Task, ...], *more: object) -> multiprocessing.ProcessContext:
    """Start `_rank(rank, world, *more)` for each rank; the processes end with the stack."""
    context = multiprocessing.start_processes(_rank, (world, *more), len(world), join=False, start_method="spawn")
    stack.push(partial(_end, context))
    return context


def _end(context: multiprocessing.ProcessContext, reason: type[BaseException] | None, *details: object) -> None:
    if reason is not KeyboardInterrupt:  # the terminal has interrupted all of them
        for process in context.processes:
            process.terminate()
    for process in context.processes:
        process.join(END_S)
        if process.is_alive():
            process.kill()
            process.join()


def _rank(rank: int, world: tuple[Task, ...], port: int, errors: SimpleQueue, body: Callable[[int], object]) -> None:
    """The process of a rank: `body(rank)`. The message of a user error goes to the launcher."""
    # SIGTERM when the launcher dies. torch asks for SIGINT, which background jobs of a shell ignore.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    platform.prepare()
    set_rank_environment(world[rank], world, HOST, port)
    try:
        body(rank)
    except RladError as error:
        errors.put(str(error))
        sys.exit(USER_ERROR)


def _train(verb: str, config: RunConfig, teacher_address: multiprocessing.Queue, rank: int) -> None:
    from rlad_megatron.run import LauncherHooks

    def find_teacher() -> TeacherAddress:
        timeout_s = config.rollout.startup_timeout_s
        try:
            return teacher_address.get(timeout=timeout_s)
        except queue.Empty:
            raise TeacherError(
                f"waited {timeout_s:g} s (rollout.startup_timeout_s) for the teacher's ranks; see "
                f"{_teacher_log(config, 0)}, or raise the timeout"
            ) from None

    run_rank(verb, config, LauncherHooks(find_teacher))


def _teach(config: RunConfig, teacher_address: multiprocessing.Queue, rank: int) -> None:
    """Its output goes to a log; the terminal is the trainer's."""
    path = _teacher_log(config, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        run_teacher_rank(config, HOST, lambda url: teacher_address.put(TeacherAddress(url, str(path))))
    except Exception:
        traceback.print_exc()  # for the log; the launcher shows it too
        raise


def _teacher_log(config: RunConfig, rank: int) -> Path:
    return config.run_dir / "logs" / f"teacher_{rank}.log"


def run_rank(
    verb: str,
    config: RunConfig,
    hooks: LauncherHooks,
    check: Callable[[RunConfig], None] | None = None,
) -> bool:
    """Join the world that the environment describes (`set_rank_environment`) and run the verb.

    verb: "train", "sft" or "teacher_gap".
    check: runs on rank 0 before anything is built, for launchers on another host; every rank raises its error.

    Returns False when the run was told to stop before its end.
    """
    _join_world(config)
    from rlad_megatron import loop
    from rlad_megatron.parallel.collective import on_first_rank
    from rlad_megatron.teacher.gap import teacher_gap

    if check is not None:
        on_first_rank(lambda: check(config), torch.distributed.group.WORLD)
    verbs = {"train": loop.train, "sft": loop.sft, "teacher_gap": teacher_gap}
    finished = verbs[verb](config, hooks)
    torch.distributed.destroy_process_group()
    return finished


def run_teacher_rank(config: RunConfig, host: str, publish: Callable[[str], None]) -> None:
    """Join the teacher's world, which the environment describes as for `run_rank`, and answer until it is ended.

    host: address that rank 0 listens on. publish: called on rank 0 with the URL when the teacher is ready.
    """
    _join_world(config)
    from rlad_megatron.teacher.service import serve_teacher

    serve_teacher(config, host, publish)


def _join_world(config: RunConfig) -> None:
    """Set up the device, which Megatron-Core needs when it is imported, and the process group."""
    platform.setup()
    check_device(
        config, DeviceFacts(platform.capability(), platform.cuda_version(), platform.transformer_engine_version())
    )
    if not platform.has_cuda():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    platform.init_process_group(config.train.distributed_timeout_s)
