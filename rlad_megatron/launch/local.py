"""Start the ranks of a run on this machine and wait for them."""

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
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import multiprocessing

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import USER_ERROR, ConfigError, RladError, TeacherError, TrainingError
from rlad_megatron.launch.announce import PORTS, free_port
from rlad_megatron.models.precision import DeviceFacts, check_device

if TYPE_CHECKING:
    from rlad_megatron.run import LauncherHooks
    from rlad_megatron.teacher.client import TeacherAddress

HOST = "127.0.0.1"
END_S = 10.0  # between SIGTERM and SIGKILL
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def run_local(verb: str, config: RunConfig) -> int:
    """Run a verb (`run_rank`) on ranks of this machine, with the teacher's own if it has some; returns the exit code.

    When a rank fails the others are ended. An error of the user's is printed once, as one line; anything else
    raises with the rank's traceback.
    """
    if config.train.gpus_per_node and not torch.cuda.is_available():
        raise ConfigError(
            f"train.gpus_per_node={config.train.gpus_per_node}, but torch finds no GPU on this machine; "
            "use train.gpus_per_node=0 for a run on CPUs"
        )
    context = multiprocessing.get_context("spawn")
    errors, teacher_address = context.SimpleQueue(), context.Queue()
    seed = secrets.randbelow(len(PORTS))
    trainer_port, teacher_port = (free_port(HOST, seed + part) for part in (0, len(PORTS) // 2))
    ranks = config.teacher_world_size if verb == "teacher_gap" else config.train.world_size
    # It says that it ends the other ranks when one has failed; why one has is the line to read.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            stack.enter_context(no_process_left())
            groups = [_start(stack, _rank, (verb, config, ranks, trainer_port, errors, teacher_address), ranks)]
            if verb == "train" and config.teacher_is_dedicated:
                arguments = (config, teacher_port, errors, teacher_address)
                # First: when it fails the trainer does too, and it is the cause that is to be shown.
                groups.insert(0, _start(stack, _teacher_rank, arguments, config.teacher_world_size))
            _wait_for_last(groups)
    except multiprocessing.ProcessExitedException as failure:
        if errors.empty():
            raise _ended(config, failure, of_teacher=failure.error_pid not in groups[-1].pids()) from failure
        # The same error reaches several ranks; one of them is enough.
        print(f"rlad: {errors.get()}", file=sys.stderr)
        return USER_ERROR
    return 0


def _ended(config: RunConfig, failure: multiprocessing.ProcessExitedException, *, of_teacher: bool) -> RladError:
    """A rank that ended without a word: killed, or by a crash outside Python."""
    if of_teacher:
        return TeacherError(
            f"rank {failure.error_index} of the teacher ended ({failure.msg}); see "
            f"{_teacher_log(config, failure.error_index)}, and the machine's memory"
        )
    return TrainingError(
        f"rank {failure.error_index} ended ({failure.msg}); see what it said above, and the machine's memory"
    )


@contextmanager
def no_process_left() -> Iterator[None]:
    """End, at its end, whatever ranks have left behind.

    The process that Megatron's checkpoint writer keeps lives on when its rank is killed. As a subreaper this process
    becomes the parent of such; SIGTERM, which would end it without a word, goes the way of an error.
    """

    def leave(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut short what the first one asks for
        sys.exit(128 + signum)

    prctl = ctypes.CDLL(None).prctl
    resource_tracker.ensure_running()  # it is a child of this process too, and ends with it
    before = psutil.Process().children()
    handler = signal.signal(signal.SIGTERM, leave)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        orphans = [child for child in psutil.Process().children() if child not in before]
        left = orphans + [process for orphan in orphans for process in orphan.children(recursive=True)]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(left, timeout=END_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=END_S)
        prctl(PR_SET_CHILD_SUBREAPER, 0)
        signal.signal(signal.SIGTERM, handler)


def _start(stack: ExitStack, body: Callable, arguments: tuple, ranks: int) -> multiprocessing.ProcessContext:
    """Start processes that end with the stack."""
    context = multiprocessing.start_processes(body, arguments, ranks, join=False, start_method="spawn")
    stack.push(partial(_end, context))
    return context


def _end(context: multiprocessing.ProcessContext, reason: type[BaseException] | None, *details: object) -> None:
    if reason is not KeyboardInterrupt:  # the terminal has sent it to all, and they are ending by themselves
        for process in context.processes:
            process.terminate()
    for process in context.processes:
        process.join(END_S)
        if process.is_alive():
            process.kill()
            process.join()


def _wait_for_last(groups: list[multiprocessing.ProcessContext]) -> None:
    """Return when the last group's processes have ended; raise the first failure of any, of an earlier group before."""
    while groups[-1].sentinels:
        connection.wait([sentinel for group in groups for sentinel in group.sentinels])
        for group in groups:
            group.join(timeout=0)


def _rank(
    local_rank: int, verb: str, config: RunConfig, ranks: int, port: int, errors, teacher_address: multiprocessing.Queue
) -> None:
    """Body of one rank of the trainer."""
    _end_with_launcher()
    from rlad_megatron.platform import prepare

    prepare()
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

    _describe_world(local_rank, ranks, port, device=local_rank)
    _report_to(errors, lambda: run_rank(verb, config, LauncherHooks(find_teacher=find_teacher)))


def _teacher_rank(
    local_rank: int, config: RunConfig, port: int, errors, teacher_address: multiprocessing.Queue
) -> None:
    """Body of one of the teacher's own ranks. What it says goes to a log, since the terminal is the trainer's."""
    _end_with_launcher()
    from rlad_megatron.platform import prepare

    prepare()
    from rlad_megatron.teacher.client import TeacherAddress

    path = _teacher_log(config, local_rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())

    def announce(url: str) -> None:
        teacher_address.put(TeacherAddress(url, str(path)))

    def teach() -> None:
        try:
            run_teacher_rank(config, HOST, announce)
        except Exception:
            traceback.print_exc()  # for the log; the launcher shows it too
            raise

    _describe_world(local_rank, config.teacher_world_size, port, device=config.train.ranks_per_node + local_rank)
    _report_to(errors, teach)


def _teacher_log(config: RunConfig, rank: int) -> Path:
    return config.run_dir / "logs" / f"teacher_{rank}.log"


def _describe_world(rank: int, world_size: int, port: int, *, device: int) -> None:
    """As torchrun would. device: of this machine's GPUs, if it has some."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(device),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
    }


def _end_with_launcher() -> None:
    """Torch asks for SIGINT at the launcher's death, which whatever a shell starts in the background ignores."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _report_to(errors, body: Callable[[], object]) -> None:
    """Run the body of a rank; an error of the user's goes to the launcher as its text."""
    try:
        body()
    except RladError as error:
        errors.put(str(error))
        sys.exit(USER_ERROR)


def run_rank(
    verb: str,
    config: RunConfig,
    hooks: LauncherHooks | None = None,
    check: Callable[[RunConfig], None] | None = None,
) -> bool:
    """Join the world that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and run the verb.

    verb: "train", "sft" or "teacher_gap".
    check: made on rank 0 before anything is built; its error is raised on every rank. Where the launcher is not on
    the trainer's host it cannot make it itself.
    Returns False when the run was told to stop before its end.
    """
    _join_world(config, config.train.ranks_per_node)
    from rlad_megatron import loop
    from rlad_megatron.parallel.collective import on_first_rank
    from rlad_megatron.run import LauncherHooks
    from rlad_megatron.teacher.gap import teacher_gap

    if check is not None:
        on_first_rank(lambda: check(config), torch.distributed.group.WORLD)
    verbs = {"train": loop.train, "sft": loop.sft, "teacher_gap": teacher_gap}
    finished = verbs[verb](config, hooks or LauncherHooks())
    torch.distributed.destroy_process_group()
    return finished


def run_teacher_rank(config: RunConfig, host: str, announce: Callable[[str], None]) -> None:
    """Join the teacher's own world, which the environment describes as for `run_rank`, and answer until it is ended.

    host: address to listen on, on rank 0. announce: called there with the URL when the teacher is ready.
    """
    _join_world(config, config.teacher.ranks_per_node)
    from rlad_megatron.teacher.service import serve_teacher

    serve_teacher(config, host, announce)


def _join_world(config: RunConfig, ranks_on_host: int) -> None:
    """Make the device ready, which Megatron-Core has to find so when it is imported, and meet the other ranks."""
    from rlad_megatron import platform

    platform.setup()
    check_device(
        config, DeviceFacts(platform.capability(), platform.cuda_version(), platform.transformer_engine_version())
    )
    if not platform.has_cuda():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_on_host))
    platform.init_process_group(config.train.distributed_timeout_s)
