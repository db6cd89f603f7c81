"""What the tasks of a Slurm job run. `slurm/job.sh` starts them; nothing here starts a step.

    python -m rlad_megatron.launch.slurm submit SCRIPT [--nodes=N ...] RECIPE key=value ...   before sbatch
    python -m rlad_megatron.launch.slurm study STUDY   how many tasks, first and all
    python -m rlad_megatron.launch.slurm place RECIPE key=value ...                           once in the job
    python -m rlad_megatron.launch.slurm train RECIPE key=value ...                           a rank of the trainer
    python -m rlad_megatron.launch.slurm teach RECIPE key=value ...                           a dedicated teacher's rank
    python -m rlad_megatron.launch.slurm serve RECIPE key=value ...                           a rollout server

In the job RECIPE is the frozen configuration (`launch/frozen.py`). A task learns from Slurm's variables which one it
is, and from the configuration where all others are.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlad_megatron.config import RunConfig, validate
from rlad_megatron.config.placement import Role, Task, place, with_role
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import ConfigError, RladError, RolloutError, RunComplete, TeacherError, TrainingError
from rlad_megatron.launch import frozen
from rlad_megatron.launch.allocation import check_job, check_submission, expand_nodes, steps
from rlad_megatron.launch.lock import STALE_S, only_writer
from rlad_megatron.launch.rendezvous import node_address, publish, set_rank_environment, wait_for
from rlad_megatron.launch.scratch import scratch
from rlad_megatron.parallel.ports import PORTS, free_port
from rlad_megatron.secret import shared_token
from rlad_megatron.servers.transfer.weights_file import all_files, in_memory, remove
from rlad_megatron.study.definition import load_study
from rlad_megatron.trainer.run_state import check_run_dir, latest_step

# Files in the job's folder; launch/signals.sh and slurm/job.sh know them.
STOP_FILE = "stop"  # by the batch script: the time limit is near
REQUEUE_FILE = "requeue"  # by a trainer that stopped before its end: the step of its checkpoint
FAILED_FILE = "failed"  # by the first task that fails with a user error: its message
FINISHED_FILE = "finished"  # by the trainer's rank 0; an exit code of 0 alone does not say so
VERBS: dict[Role, str] = {"trainer": "train", "teacher": "teach", "server": "serve"}
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """The job as one of its tasks sees it."""

    config: RunConfig
    tasks: tuple[Task, ...]  # of the whole job
    job_id: int
    restarts: int  # how often Slurm has requeued it
    proc_id: int  # number of this task in its step
    step_tasks: int  # tasks of its step

    @classmethod
    def from_environment(cls, config: RunConfig, environment: Mapping[str, str]) -> Job:
        """Raises ConfigError outside a job, and when the job has too few nodes.

        A requeued job resumes its run, if an earlier start created the run folder.
        """
        if "SLURM_JOB_ID" not in environment:
            raise ConfigError("SLURM_JOB_ID is not set: this runs inside a Slurm job; submit slurm/*.sh with sbatch")
        restarts = _restarts(environment)
        return cls(
            replace(
                config,
                resume=config.resume or (restarts > 0 and config.run_dir.is_dir()),
                resume_step=0 if restarts > 0 else config.resume_step,  # `latest` names a later one by now
            ),
            place(config, expand_nodes(environment["SLURM_JOB_NODELIST"])),
            job_id=int(environment["SLURM_JOB_ID"]),
            restarts=restarts,
            proc_id=int(environment.get("SLURM_PROCID", 0)),
            step_tasks=int(environment.get("SLURM_NTASKS", 1)),
        )

    @property
    def folder(self) -> Path:
        """Logs and published files of this start of the job."""
        return (self.config.run_dir / "logs" / f"job_{self.job_id}_{self.restarts}").resolve()

    @property
    def token_file(self) -> Path:
        """The secret of this start's servers and teacher (`secret.shared_token`)."""
        return self.folder / "token"

    def this_task(self, role: Role) -> Task:
        """The task that this process is. Raises ConfigError if its step has another number of tasks than the layout."""
        tasks = with_role(self.tasks, role)
        if self.step_tasks != len(tasks):
            raise ConfigError(
                f"the step has {self.step_tasks} tasks, but the layout has {len(tasks)}; use srun --ntasks={len(tasks)}"
            )
        return tasks[self.proc_id]

    def address_of(self, task: Task) -> str:
        """The address of this process's node, at which the others reach it."""
        return node_address(task.host, multi_node=len({other.node for other in self.tasks}) > 1)

    def request_requeue(self, step: int) -> None:
        """Have the batch script requeue the job, which stopped at `step` of its run.

        Raises TrainingError if the start before this one stopped at the same step, so another start would too.
        """
        before = replace(self, restarts=self.restarts - 1).folder / REQUEUE_FILE
        if before.is_file() and int(before.read_text()) == step:
            raise TrainingError(
                f"told to stop at step {step}, as was the start before this one: a start and a step need more than "
                "the time from the job's start to its signal; submit with resume=true and a longer --time, or a later "
                "--signal=B:USR1@SECONDS"
            )
        (self.folder / REQUEUE_FILE).write_text(f"{step}\n")


def _restarts(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_RESTART_COUNT", 0))


def submit(script: str, *words: str) -> None:
    """Check the layout against the script's #SBATCH lines and the options; freeze the configuration; print its file."""
    options = [word for word in words if word.startswith("-")]
    recipe, *overrides = [word for word in words if not word.startswith("-")]
    config = load_run(recipe, overrides)
    validate(config)
    values = {}
    for option in re.findall(r"^#SBATCH\s+(--\S+)", Path(script).read_text(), flags=re.MULTILINE) + options:
        long = re.sub("^-d", "--dependency=", re.sub("^-N", "--nodes=", option))  # -N2 is --nodes=2
        name, _, value = long.removeprefix("--").partition("=")
        values[name] = value
    try:
        nodes = int(values.get("nodes", 1))
        # A number may have a type before it: h100:8.
        gpus = int(values["gpus-per-node"].rpartition(":")[2]) if "gpus-per-node" in values else None
    except ValueError as error:
        raise ConfigError(f"{script}: --nodes and --gpus-per-node must be numbers ({error})") from None
    # The run folder may change before a job that waits for another starts; that job checks it then.
    check_submission(config, nodes, gpus, run_dir=not {"dependency", "begin"} & values.keys())
    print(frozen.freeze(config))


def place_job(recipe: str, overrides: list[str], environment: Mapping[str, str]) -> None:
    """Check the job and print what `slurm/job.sh` needs: the frozen configuration, the steps, the folder of the logs.

    recipe: the file that `submit` wrote. Anything else comes from plain `sbatch`, which runs none of our code, so the
    job's first start freezes it here, in a file named by the job's id, and a requeued job reads that.
    """
    file = Path(recipe)
    is_frozen = file.parent == frozen.SUBMITTED
    if not is_frozen:
        file = frozen.SUBMITTED / f"job_{environment.get('SLURM_JOB_ID')}.yaml"
        # Not on a first start: an allocation of salloc can run several scripts, and ids can repeat after a reset.
        is_frozen = _restarts(environment) > 0 and file.is_file()
    config = load_run(str(file) if is_frozen else recipe, overrides)
    validate(config)
    job = Job.from_environment(config, environment)
    gpus = environment.get("SLURM_GPUS_ON_NODE")
    check_job(config, len(expand_nodes(environment["SLURM_JOB_NODELIST"])), int(gpus) if gpus else None)
    # The trainer's rank 0 takes it again. A job that waited for another may find the lock of a node that failed.
    with only_writer(config.run_dir, "train", patience_s=STALE_S):
        check_run_dir(job.config)
    if not is_frozen:
        frozen.freeze(config, file)
    job.folder.mkdir(parents=True, exist_ok=True)
    print("rlad-config", file)
    for step in steps(job.tasks):
        print("rlad-step", step.role, VERBS[step.role], step.nodes, step.first_node, step.tasks, step.tasks_per_node)
    print("rlad-folder", job.folder)


def rendezvous(job: Job, role: Role) -> tuple[Task, dict[str, Any]]:
    """Wait for all ranks of a world and get ready to join it; returns this rank and what it published.

    torch's own rendezvous would time out without naming the missing rank.
    """
    me, world = job.this_task(role), with_role(job.tasks, role)
    address = job.address_of(me)
    # A port counts as free until a process listens on it, so two worlds on one node must not probe the same port.
    seed = job.job_id + (len(PORTS) // 2 if role == "teacher" else 0)
    facts = {"address": address, "port": free_port(address, seed)}
    publish(job.folder, me, **facts)
    first = wait_for(job.folder, world, job.config.rollout.startup_timeout_s, "port")[0]
    set_rank_environment(me, world, first["address"], first["port"])
    from rlad_megatron import platform

    platform.prepare()
    return me, facts


def train(job: Job) -> None:
    """A rank of the trainer, until the run ends or is told to stop; then it saves after its step."""
    config = job.config
    me, facts = rendezvous(job, "trainer")
    from rlad_megatron.launch.local import run_rank
    from rlad_megatron.launch.preflight import check_sft, check_train
    from rlad_megatron.run import LauncherHooks
    from rlad_megatron.teacher.client import TeacherAddress

    def urls(tasks: Sequence[Task]) -> list[str]:
        return [found["url"] for found in wait_for(job.folder, tasks, config.rollout.startup_timeout_s, "url")]

    def find_teacher() -> TeacherAddress:
        first, *_ = with_role(job.tasks, "teacher")
        log = str(job.folder / f"{first.file_stem}.log")
        return TeacherAddress(urls([first])[0], log, shared_token(job.token_file))

    # A file instead of a signal: a signal would kill tasks that have no handler yet, and the processes that write a
    # checkpoint.
    stop_requested = (job.folder / STOP_FILE).exists
    verb, preflight = ("train", partial(check_train, starts_servers=False)) if config.generates else ("sft", check_sft)
    hooks = LauncherHooks(
        find_teacher,
        prompts_read=lambda max_model_len: publish(job.folder, me, **facts, max_model_len=max_model_len),
        find_servers=lambda: urls(with_role(job.tasks, "server")),
        token_file=job.token_file,
        stop_requested=stop_requested,
    )
    with only_writer(config.run_dir, verb, patience_s=STALE_S) if me.index == 0 else nullcontext():
        finished = run_rank(verb, config, hooks, job.folder, check=preflight)
    if me.index == 0 and finished:
        (job.folder / FINISHED_FILE).touch()
    elif me.index == 0:
        # A file instead of an exit code: srun would kill the other ranks when the first one exits with it.
        job.request_requeue(latest_step(config.run_dir / "checkpoints") or 0)


def teach(job: Job) -> None:
    """A rank of a dedicated teacher, until it is ended. Raises TeacherError if the model is not on this node."""
    config = job.config
    me, facts = rendezvous(job, "teacher")
    from rlad_megatron.launch.local import run_teacher_rank
    from rlad_megatron.launch.preflight import check_model
    from rlad_megatron.models.config_json import read_role_spec

    try:  # here, because this node's file system can differ from the trainer's
        check_model("teacher", config.teacher, read_role_spec("teacher", config.teacher.path))
    except RladError as error:
        raise TeacherError(f"{me.name}: {error}") from error
    token = shared_token(job.token_file)
    run_teacher_rank(config, str(facts["address"]), lambda url: publish(job.folder, me, **facts, url=url), token)


def serve(job: Job) -> None:
    """A rollout server, until it is told to stop (SIGTERM). Raises RolloutError if vLLM exits."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    config, me = job.config, job.this_task("server")

    from rlad_megatron import platform
    from rlad_megatron.servers.process import own_server
    from rlad_megatron.servers.transfer.choice import choose_transfer

    # The trainer's rank 0 reads the prompts.
    first_rank = with_role(job.tasks, "trainer")[:1]
    facts = wait_for(job.folder, first_rank, config.rollout.startup_timeout_s, "max_model_len")[0]
    address = job.address_of(me)
    shared_token(job.token_file)
    server = own_server(
        replace(config.rollout, servers=sum(task.node == me.node for task in with_role(job.tasks, "server"))),
        me.index,
        model_path=config.student.path,
        max_model_len=facts["max_model_len"],
        run_dir=config.run_dir,
        seed=config.train.seed,
        devices=",".join(map(str, me.gpus)) or None,
        transfer=choose_transfer(config, platform.has_cuda()),
        token_file=job.token_file,
        returns_experts=config.rollout.router_replay,
        host=address,
        port=free_port(address, job.job_id * 64 + me.index),
    )
    with ExitStack() as stack:
        stack.callback(remove, all_files(config.run_dir))
        stack.callback(server.stop)
        server.start()
        server.wait_ready()
        publish(job.folder, me, url=server.client.url)
        print(f"{me.name} answers at {server.client.url}", flush=True)
        while server.alive():
            time.sleep(POLL_S)
        raise RolloutError(f"{me.name} ended; {server.log_tail()}")


def main(arguments: list[str] | None = None) -> int:
    """Exit codes are those of `rlad`."""
    verb, first, *words = sys.argv[1:] if arguments is None else arguments
    job = None
    try:
        if verb == "submit":
            submit(first, *words)
        elif verb == "study":
            plan = load_study(first)
            print(plan.first, len(plan.tasks))
        elif verb == "place":
            place_job(first, words, os.environ)
        else:
            job = Job.from_environment(load_run(first, words), os.environ)
            # A teacher's rank may start after the file of weights was made.
            with scratch(() if verb == "teach" else in_memory(job.config.run_dir)):
                {"train": train, "teach": teach, "serve": serve}[verb](job)
    except RladError as error:
        print(f"rlad: {error}", file=sys.stderr, flush=True)
        if isinstance(error, RunComplete) and job is not None:
            (job.folder / FINISHED_FILE).touch()
        if error.exit_code and job is not None:  # the batch script ends the job then, even if srun still waits
            with suppress(FileExistsError), (job.folder / FAILED_FILE).open("x") as file:
                file.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
