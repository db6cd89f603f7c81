"""Recipes as NeMo-Run experiments: `rlad-nemo RECIPE --executor local|slurm ... key=value`.

The only module that imports `nemo_run`. It runs on the launching machine in a separate environment without torch
(`make nemo-env`); the tasks run in the trainer's environment, given by --python.

Local: one task, `rlad train`, which starts its own ranks and servers. Slurm: one experiment of task groups in one
allocation, for the trainer's ranks, a dedicated teacher's and the rollout servers, which run
`rlad_megatron.launch.slurm`. All tasks read the configuration that was frozen at the launch.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rlad_megatron.errors import USER_ERROR, ConfigError, RladError

try:
    import nemo_run as run
except ModuleNotFoundError:
    print("rlad: nemo_run is not installed here; `make nemo-env`, then .venv-nemo/bin/rlad-nemo", file=sys.stderr)
    sys.exit(USER_ERROR)
from invoke.exceptions import UnexpectedExit
from nemo_run.core.execution.slurm import SlurmBatchRequest
from nemo_run.run.job import JobGroup
from torchx.specs.api import AppState

from rlad_megatron.command import print_out
from rlad_megatron.config import RunConfig, validate
from rlad_megatron.config.placement import place
from rlad_megatron.config.recipe import from_tree, load_run, recipe_names, recipe_purpose
from rlad_megatron.launch.allocation import Step, steps
from rlad_megatron.launch.frozen import freeze
from rlad_megatron.launch.nemo_options import check, interpreter, option_parser
from rlad_megatron.launch.slurm import VERBS

TASKS = "rlad_megatron.launch.slurm"
SIGNALS = Path(__file__).with_name("signals.sh")


def as_nemo_config(value: object) -> object:
    """A tree of dicts as a `run.Config`, whose values NeMo-Run's command line can change.

    Dicts, because NeMo-Run prints a traceback where a section of `RunConfig` refuses a value.
    """
    if not isinstance(value, dict):
        return value
    return run.Config(dict, **{name: as_nemo_config(below) for name, below in value.items()})


def _register(name: str) -> None:
    def recipe() -> run.Config[RunConfig]:
        return as_nemo_config(dataclasses.asdict(load_run(name, [])))

    recipe.__name__ = name
    recipe.__doc__ = recipe_purpose(name)
    recipe.__annotations__["return"] = run.Config[RunConfig]
    run.cli.factory(recipe, target=RunConfig, name=name)


for _name in recipe_names():
    _register(_name)


@run.cli.entrypoint(name="train", namespace="rlad", type="experiment")
def train(ctx: run.cli.RunContext, recipe: RunConfig, python: str = ".venv/bin/python") -> None:
    """Run a recipe on this machine: nemorun rlad train recipe=kk_tiny_cpu recipe.train.steps=10"""
    try:
        config = from_tree(typing.cast(dict, recipe))  # as as_nemo_config made it
        validate(config)
        launch(config, partial(local_experiment, config, interpreter(python)), dry_run=ctx.dryrun)
    except RladError as error:  # NeMo-Run would print a traceback
        print(f"rlad: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def local_experiment(config: RunConfig, python: str, file: Path) -> run.Experiment:
    """One task on this machine. file: the frozen configuration."""
    verb = "train" if config.generates else "sft"
    with run.Experiment(config.name) as experiment:
        experiment.add(
            run.Script(path="rlad_megatron.cli", m=True, entrypoint=python, args=[verb, str(file)]),
            executor=run.LocalExecutor(),
            name=verb,
        )
    return experiment


def slurm_experiment(config: RunConfig, options: argparse.Namespace, file: Path) -> run.Experiment:
    """Trainer, teacher and servers as task groups of one allocation. file: the frozen configuration.

    Tasks run in the folder of the launch, so that relative paths keep their meaning.
    """
    groups = steps(place(config))
    # By `env`, because NeMo-Run already passes --container-workdir and pyxis refuses a second one.
    folder = shlex.quote(f"--chdir={Path.cwd()}")
    commands = [[options.python, "-m", TASKS, VERBS[step.role], str(file)] for step in groups]
    with run.Experiment(config.name) as experiment:
        experiment.add(
            [run.Script(entrypoint="env", path=folder, args=[*map(shlex.quote, words)]) for words in commands],
            executor=[_executor(config, file, options, step) for step in groups],
            name=config.name,
        )
    return experiment


def _setup(config: RunConfig, file: Path) -> str:
    """Lines of the batch script before its sruns: those of `slurm/job.sh`, from the same file."""
    folder = f"{config.run_dir.resolve()}/logs/job_${{SLURM_JOB_ID}}_${{SLURM_RESTART_COUNT:-0}}"
    copy = f'mkdir -p "$rlad_folder" && cp {shlex.quote(str(file.absolute()))} "$rlad_folder/config.yaml"'
    traps = "trap rlad_tell_to_stop USR1\ntrap 'rlad_finish $?' EXIT"
    return f"rlad_folder={folder}\n{copy}\n{SIGNALS.read_text()}{traps}"


def _executor(config: RunConfig, file: Path, options: argparse.Namespace, step: Step) -> run.SlurmExecutor:
    """The job's resources, and the share of one group's srun."""
    srun = ["--overlap", "--mem=0", "--distribution=block", f"--nodes={step.nodes}", f"--relative={step.first_node}"]
    srun += [f"--ntasks={step.tasks}", f"--ntasks-per-node={step.tasks_per_node}"]
    if options.container_image:
        srun.append("--container-writable")  # as in slurm/job.sh
    return run.SlurmExecutor(
        account=options.account,
        partition=options.partition,
        job_name_prefix="rlad.",
        time=options.time,
        nodes=options.nodes,
        ntasks_per_node=step.tasks_per_node,
        gpus_per_node=options.gpus_per_node or None,
        exclusive=True if options.gpus_per_node else None,
        mem="0" if options.gpus_per_node else None,
        signal=options.signal,
        additional_parameters={"requeue": True},
        container_image=options.container_image or None,
        container_mounts=[f"{Path.cwd()}:{Path.cwd()}", *filter(None, options.container_mounts.split(","))],
        srun_args=srun,
        setup_lines=_setup(config, file),
        wait_time_for_group_job=0,
        monitor_group_job_wait_time=5,
        tunnel=run.LocalTunnel(job_dir=""),  # NeMo-Run's folder, on the shared file system
        packager=run.Packager(),
    )


def dryrun(experiment: run.Experiment) -> str:
    """The sbatch script (Slurm) or the command of each task (local)."""
    with experiment:
        experiment.dryrun(log=False)  # the log's line wraps would break the script
        requests = [
            info.request
            for job in experiment.jobs
            for info in (job._dryrun_infos if isinstance(job, JobGroup) else [job._dryrun_info])
        ]
    return "\n".join(
        request.materialize()
        if isinstance(request, SlurmBatchRequest)
        else "\n".join(shlex.join(replica.args) for role in request.role_params.values() for replica in role)
        for request in requests
    )


def launch(config: RunConfig, build: Callable[[Path], run.Experiment], *, dry_run: bool) -> bool:
    """Run the experiment and follow its logs, or print its script; returns whether it succeeded.

    build: makes the experiment from the frozen configuration, which is removed if the job is refused.
    Raises ConfigError if sbatch refuses the job.
    """
    file = freeze(config)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # NeMo-Run's output is not part of the script
            experiment = build(file)
            script = dryrun(experiment) if dry_run else ""
        if dry_run:
            print_out(f"{script}\n")  # which reads the file
            return True
        with experiment:
            experiment.run(detach=False, tail_logs=True)
    except UnexpectedExit as failure:
        file.unlink()
        reason = (failure.result.stderr.strip().splitlines() or [f"exit code {failure.result.exited}"])[-1]
        raise ConfigError(f"the job was not submitted: {reason}; fix the option, or Slurm here (`sinfo`)") from None
    return all(job.state == AppState.SUCCEEDED for job in experiment.jobs)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes are those of `rlad`."""
    options = option_parser().parse_intermixed_args(arguments)
    try:
        config = load_run(options.recipe, options.overrides)
        check(config, options)
        local = options.executor == "local"
        build = (
            partial(local_experiment, config, options.python) if local else partial(slurm_experiment, config, options)
        )
        return 0 if launch(config, build, dry_run=options.dryrun) else 1
    except RladError as error:
        print(f"rlad: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
