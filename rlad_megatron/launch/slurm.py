"""What the tasks of a Slurm job run. `slurm/job.sh` starts them; nothing here starts a step.

    python -m rlad_megatron.launch.slurm check SCRIPT [--nodes=N ...] RECIPE key=value ...   before submitting
    python -m rlad_megatron.launch.slurm place RECIPE key=value ...                          once in the job
    python -m rlad_megatron.launch.slurm train RECIPE key=value ...                          a rank of the trainer
    python -m rlad_megatron.launch.slurm teach RECIPE key=value ...                          a rank of the teacher's own
    python -m rlad_megatron.launch.slurm serve RECIPE key=value ...                          a rollout server

A task learns from Slurm's variables who it is, and from the configuration where everybody else is.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rlad_megatron.config import RunConfig, validate
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import USER_ERROR, ConfigError, RladError, RolloutError, TeacherError, TrainingError
from rlad_megatron.launch.announce import PORTS, announce, free_port, own_address, wait_for
from rlad_megatron.launch.placement import Placement, Task, check_job, check_models, expand_nodes, place
from rlad_megatron.trainer.run_state import check_run_dir, latest_step

# Files in the job's folder. The batch script leaves this one when Slurm has told it that the time limit is near. A
# signal to the tasks would do harm: one that has not yet set a handler dies of it, and so do helpers of a rank, such as
# the processes that write a checkpoint.
STOP_FILE = "stop"
# For the batch script:
REQUEUE_FILE = "requeue"  # by a trainer that stopped before its end: the step of its checkpoint
FAILED_FILE = "failed"  # by the first task with an error that the user can mend: what it said
VERBS = {"trainer": "train", "teacher": "teach", "server": "serve"}  # what the tasks of a step are told to do
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """The job as one of its tasks sees it."""

    config: RunConfig
    placement: Placement
    job_id: int
    restarts: int  # times that Slurm has requeued it
    task: int  # number of this task in its step
    tasks: int  # of the step

    @classmethod
    def from_environment(cls, config: RunConfig, environment: Mapping[str, str]) -> Job:
        """Raises ConfigError outside a job, and when the nodes do not suffice.

        A job that Slurm has started before goes on with its run, if that start came so far.
        """
        if "SLURM_JOB_ID" not in environment:
            raise ConfigError("SLURM_JOB_ID is not set: this runs inside a Slurm job; submit slurm/*.sh with sbatch")
        nodes = expand_nodes(environment["SLURM_JOB_NODELIST"])
        restarts = int(environment.get("SLURM_RESTART_COUNT", 0))
        return cls(
            replace(config, resume=config.resume or (restarts > 0 and config.run_dir.is_dir())),
            place(config, nodes),
            job_id=int(environment["SLURM_JOB_ID"]),
            restarts=restarts,
            task=int(environment.get("SLURM_PROCID", 0)),
            tasks=int(environment.get("SLURM_NTASKS", 1)),
        )

    @property
    def folder(self) -> Path:
        """Logs and announcements of this start of the job."""
        return self._folder_of(self.restarts)

    def _folder_of(self, restarts: int) -> Path:
        return (self.config.run_dir / "logs" / f"job_{self.job_id}_{restarts}").resolve()

    def one_of(self, tasks: tuple[Task, ...]) -> Task:
        """Which of the tasks this process is. Raises ConfigError when the step has another number of tasks."""
        if self.tasks != len(tasks):
            raise ConfigError(f"the step has {self.tasks} tasks, but the layout has {len(tasks)}; srun --ntasks=...")
        return tasks[self.task]

    def report_failure(self, error: RladError) -> None:
        """Keep the first error of the job's tasks, so that it is shown and the job ends, whatever srun waits for."""
        with contextlib.suppress(FileExistsError), (self.folder / FAILED_FILE).open("x") as file:
            file.write(f"{error}\n")

    def ask_for_requeue(self, step: int) -> None:
        """Have the batch script requeue the job, which stopped at `step` of its run.

        Raises TrainingError if the start before this one stopped there too: the next would do no better.
        """
        before = self._folder_of(self.restarts - 1) / REQUEUE_FILE
        if before.is_file() and int(before.read_text()) == step:
            raise TrainingError(
                f"told to stop at step {step}, as was the start before this one: a start and a step need more than "
                "the time from the job's start to its signal; submit with resume=true and a longer --time, or a later "
                "--signal=B:USR1@SECONDS"
            )
        (self.folder / REQUEUE_FILE).write_text(f"{step}\n")

    @property
    def has_other_nodes(self) -> bool:
        return len({task.node for task in self.placement.tasks}) > 1


def check(script: str, options: list[str], config: RunConfig) -> None:
    """Whether a submission can work: the layout against what the script's #SBATCH lines and the options ask for."""
    validate(config)
    asked = re.findall(r"^#SBATCH\s+(--\S+)", Path(script).read_text(), flags=re.MULTILINE) + options
    values = {}
    for option in asked:
        long = re.sub("^-d", "--dependency=", re.sub("^-N", "--nodes=", option))  # -N2 is --nodes=2
        name, _, value = long.removeprefix("--").partition("=")
        values[name] = value
    try:
        nodes = int(values.get("nodes", 1))
        # A number may have a type before it: h100:8.
        gpus = int(values["gpus-per-node"].rpartition(":")[2]) if "gpus-per-node" in values else None
    except ValueError as error:
        raise ConfigError(f"{script}: --nodes and --gpus-per-node must be numbers ({error})") from None
    check_job(config, nodes, gpus)
    # A job that waits for another may find what is not there yet: it asks once more.
    if not {"dependency", "begin"} & values.keys():
        check_seen_run_dir(config)
    warn_of_shortage(config)


def check_seen_run_dir(config: RunConfig) -> None:
    """`check_run_dir`, unless the folder of runs is on a file system that the nodes alone may see."""
    runs_dir = Path(config.runs_dir)
    if runs_dir.is_dir() or not runs_dir.is_absolute():
        check_run_dir(config)


def warn_of_shortage(config: RunConfig) -> None:
    """A line on stderr where the run is planned not to fit. Raises as `check_models`."""
    shortage = check_models(config)
    if shortage:
        print(f"rlad: warning: {config.name} may not fit: {shortage}; `rlad plan` names a change", file=sys.stderr)


def print_placement(config: RunConfig, environment: Mapping[str, str]) -> None:
    """Check the job and print what `slurm/job.sh` needs: a line for each step, and one for the folder of the logs."""
    validate(config)
    job = Job.from_environment(config, environment)
    gpus = environment.get("SLURM_GPUS_ON_NODE")
    check_job(job.config, len(expand_nodes(environment["SLURM_JOB_NODELIST"])), int(gpus) if gpus else None)
    check_models(job.config)
    check_run_dir(job.config)
    job.folder.mkdir(parents=True, exist_ok=True)
    for step in job.placement.steps:
        print("rlad-step", step.role, VERBS[step.role], step.nodes, step.first_node, step.tasks, step.tasks_per_node)
    print("rlad-folder", job.folder)


def train(job: Job) -> None:
    """A rank of the trainer, until the run's end or until it is told to stop: then it saves after its step."""
    config, me = job.config, job.one_of(job.placement.ranks)
    meet(job, me, job.placement.ranks)

    from rlad_megatron import platform

    platform.prepare()
    from rlad_megatron.launch.local import run_rank
    from rlad_megatron.launch.preflight import check_sft, check_train
    from rlad_megatron.run import LauncherHooks
    from rlad_megatron.teacher.client import TeacherAddress

    timeout_s = config.rollout.startup_timeout_s

    def find_servers() -> list[str]:
        return [found["url"] for found in wait_for(job.folder, job.placement.servers, timeout_s, "url")]

    def find_teacher() -> TeacherAddress:
        first = job.placement.teachers[0]
        (found,) = wait_for(job.folder, [first], timeout_s, "url")
        return TeacherAddress(found["url"], str(job.folder / f"{first.file_stem}.log"))

    verb, preflight = ("sft", check_sft)
    if config.generates:
        verb, preflight = "train", partial(check_train, starts_servers=False)
    finished = run_rank(
        verb,
        config,
        LauncherHooks(
            find_servers=find_servers, find_teacher=find_teacher, stop_requested=(job.folder / STOP_FILE).exists
        ),
        check=preflight,
    )
    if me.index == 0 and not finished:
        # A file and not an exit code: the first rank to leave with one would have the others killed.
        job.ask_for_requeue(latest_step(config.run_dir / "checkpoints") or 0)


def meet(job: Job, me: Task, world: tuple[Task, ...]) -> dict[str, object]:
    """Wait for all ranks of a world, and describe it in the environment as torchrun would.

    All of them: torch's own rendezvous would say that one is missing, but not which. Returns what this rank announced.
    """
    address = own_address(me.node, others=job.has_other_nodes)
    # A port is free until it is listened on: two worlds on one node must not look at the same one at the same time.
    seed = job.job_id + (len(PORTS) // 2 if me.role == "teacher" else 0)
    facts = {"address": address, "port": free_port(address, seed)}
    announce(job.folder, me, **facts)
    first = wait_for(job.folder, world, job.config.rollout.startup_timeout_s, "port")[0]
    os.environ |= {
        "RANK": str(me.index),
        "LOCAL_RANK": str(me.gpus[0] if me.gpus else sum(task.node == me.node for task in world[: me.index])),
        "WORLD_SIZE": str(len(world)),
        "MASTER_ADDR": first["address"],
        "MASTER_PORT": str(first["port"]),
    }
    return facts


def teach(job: Job) -> None:
    """A rank of the teacher's own, until it is ended. TeacherError when the teacher is not to be had on its node."""
    config, me = job.config, job.one_of(job.placement.teachers)
    facts = meet(job, me, job.placement.teachers)

    from rlad_megatron import platform

    platform.prepare()
    from rlad_megatron.launch.local import run_teacher_rank
    from rlad_megatron.launch.preflight import check_teacher

    try:
        check_teacher(config)  # here, for what the trainer's node has need not be on this one
    except RladError as error:
        raise TeacherError(f"{me.name}: {error}") from error
    run_teacher_rank(config, str(facts["address"]), lambda url: announce(job.folder, me, **facts, url=url))


def serve(job: Job) -> None:
    """A rollout server, until it is told to stop (SIGTERM). RolloutError when it ends by itself."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    config, me = job.config, job.one_of(job.placement.servers)

    from rlad_megatron import platform
    from rlad_megatron.data.prompts import build_prompts
    from rlad_megatron.data.tokenizers import load_tokenizer
    from rlad_megatron.servers.process import own_server
    from rlad_megatron.servers.sampling import max_model_len
    from rlad_megatron.servers.transfer.choice import choose_transfer

    tokenizer = load_tokenizer(config.student.path)
    prompts = [prompt for split in ("train", "test") for prompt in build_prompts(config.data, tokenizer, split)]
    address = own_address(me.node, others=job.has_other_nodes)
    server = own_server(
        replace(config.rollout, servers=sum(task.node == me.node for task in job.placement.servers)),
        me.index,
        model_path=config.student.path,
        max_model_len=max_model_len(config, prompts),
        run_dir=config.run_dir,
        seed=config.train.seed,
        devices=",".join(map(str, me.gpus)) or None,
        transfer=choose_transfer(config, platform.has_cuda()),
        host=address,
        port=free_port(address, job.job_id * 64 + me.index),
    )
    try:
        server.start()
        server.wait_ready()
        announce(job.folder, me, url=server.client.url)
        print(f"{me.name} answers at {server.client.url}", flush=True)
        while server.alive():
            time.sleep(POLL_S)
        raise RolloutError(f"{me.name} ended; {server.log_tail()}")
    finally:
        server.stop()


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as those of `rlad`."""
    verb, *rest = sys.argv[1:] if arguments is None else arguments
    job = None
    try:
        if verb == "check":
            script, options = rest.pop(0), [word for word in rest if word.startswith("-")]
            recipe, *overrides = [word for word in rest if not word.startswith("-")]
            check(script, options, load_run(recipe, overrides))
            return 0
        config = load_run(rest[0], rest[1:])
        if verb == "place":
            print_placement(config, os.environ)
        else:
            job = Job.from_environment(config, os.environ)
            {"train": train, "teach": teach, "serve": serve}[verb](job)
    except RladError as error:
        print(f"rlad: {error}", file=sys.stderr, flush=True)
        if job is not None:
            job.report_failure(error)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
