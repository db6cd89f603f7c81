"""Recipes as NeMo-Run experiments: `rlad-nemo RECIPE --executor local|slurm ... key=value`.

The only module that imports `nemo_run`. It runs in an environment of its own on the launching machine
(`make nemo-env`), which has no torch; the tasks run in the trainer's environment, given by --python.

Local: one task, `rlad train`, which starts its own ranks and servers. Slurm: one experiment of task groups in one
allocation, the trainer's ranks, the teacher's if it has its own, and the rollout servers; all are the tasks of
`rlad_megatron.launch.slurm`.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys
import typing
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
from torchx.schedulers.local_scheduler import PopenRequest
from torchx.specs.api import AppState

from rlad_megatron.command import print_out
from rlad_megatron.config import RunConfig, validate
from rlad_megatron.config.recipe import from_tree, load_run, recipe_names, recipe_purpose, to_yaml
from rlad_megatron.launch.nemo_options import check, interpreter, option_parser
from rlad_megatron.launch.placement import Step, place
from rlad_megatron.launch.slurm import (
    FAILED_FILE,
    REQUEUE_FILE,
    STOP_FILE,
    VERBS,
)

TASKS = "rlad_megatron.launch.slurm"


# As in slurm/job.sh: near the time limit the trainer is told to stop, and leaves a file when it has. If it has not 45 s
# before the limit, the steps (`pids` in NeMo-Run's script) are ended with an error: Slurm would end the job without a
# word. The first error is shown last.
_SETUP = """\
rlad_folder={folder}
rlad_tell_to_stop() {{
    local end left
    mkdir -p "$rlad_folder" && touch "$rlad_folder/{stop}"
    # There may be no limit, and squeue no answer, which date would take for midnight.
    end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) && [[ -n $end ]] || return 0
    end=$(date --date="$end" +%s) || return 0
    left=$((end - $(date +%s) - 45))
    trap : USR1 # once is enough, and both Slurm and the user may send it
    {{
        set +xv
        sleep $((left > 0 ? left : 0))
        [[ -e $rlad_folder/{failed} ]] || echo "{message}" >"$rlad_folder/{failed}"
        kill "${{pids[@]}}" 2>/dev/null
    }} &
}}
rlad_end() {{
    set +xv # NeMo-Run's script shows each of its lines
    [[ ! -e $rlad_folder/{requeue} ]] || scontrol requeue "$SLURM_JOB_ID"
    [[ ! -e $rlad_folder/{failed} ]] || sed "s/^/rlad: /" "$rlad_folder/{failed}" >&2
}}
trap rlad_tell_to_stop USR1
trap rlad_end EXIT"""
_TOO_LATE = (
    "told to stop before the time limit, but its start or its step did not end in time; go on with resume=true, and a "
    "longer --time or an earlier --signal=B:USR1@SECONDS"
)


def as_nemo_config(value: object) -> object:
    """A tree of dicts as NeMo-Run's own configuration, whose values its command line can change.

    Dicts, because NeMo-Run would show what a section of `RunConfig` refuses as its own failure.
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
        python = interpreter(python)
    except RladError as error:  # NeMo-Run would show it as its own failure
        print(f"rlad: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    file = Path(config.runs_dir) / f"{config.name}.nemo.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_yaml(config))
    experiment = local_experiment(config, [str(file)], python)
    if ctx.dryrun:
        print(dryrun(experiment))
    else:
        launch(experiment)


def local_experiment(config: RunConfig, arguments: list[str], python: str) -> run.Experiment:
    """One task on this machine. arguments: RECIPE and overrides, as for `rlad`."""
    verb = "train" if config.generates else "sft"
    experiment = run.Experiment(config.name)
    with experiment:
        experiment.add(
            run.Script(path="rlad_megatron.cli", m=True, entrypoint=python, args=[verb, *arguments]),
            executor=run.LocalExecutor(),
            name=verb,
        )
    return experiment


def slurm_experiment(config: RunConfig, arguments: list[str], options: argparse.Namespace) -> run.Experiment:
    """Trainer, teacher and servers as task groups of one allocation."""
    steps = place(config, [""] * options.nodes).steps
    experiment = run.Experiment(config.name)
    with experiment:
        experiment.add(
            [_task(options.python, VERBS[step.role], arguments) for step in steps],
            executor=[_executor(config, options, step) for step in steps],
            name=config.name,
        )
    return experiment


def _task(python: str, verb: str, arguments: list[str]) -> run.Script:
    """A task's command, in the folder of the launch, so that relative paths mean the same as everywhere.

    By `env`: NeMo-Run gives srun a --container-workdir of its own, and pyxis refuses a second one.
    """
    command = [python, "-m", TASKS, verb, *arguments]
    return run.Script(entrypoint="env", path=shlex.quote(f"--chdir={Path.cwd()}"), args=[*map(shlex.quote, command)])


def _executor(config: RunConfig, options: argparse.Namespace, step: Step) -> run.SlurmExecutor:
    """The job's resources, and the part of them that one group's srun takes."""
    folder = f"{config.run_dir.resolve()}/logs/job_${{SLURM_JOB_ID}}_${{SLURM_RESTART_COUNT:-0}}"
    numbers = [f"--nodes={step.nodes}", f"--relative={step.first_node}"]
    numbers += [f"--ntasks={step.tasks}", f"--ntasks-per-node={step.tasks_per_node}"]
    if options.container_image:
        numbers.append("--container-writable")  # as in slurm/job.sh
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
        srun_args=["--overlap", "--mem=0", "--distribution=block", *numbers],
        setup_lines=_SETUP.format(
            folder=folder, stop=STOP_FILE, failed=FAILED_FILE, requeue=REQUEUE_FILE, message=_TOO_LATE
        ),
        wait_time_for_group_job=0,
        monitor_group_job_wait_time=5,
        tunnel=run.LocalTunnel(job_dir=""),  # NeMo-Run's own folder, on the shared file system
        packager=run.Packager(),
    )


def dryrun(experiment: run.Experiment) -> str:
    """The sbatch script (Slurm) or the command (local) of each task, as they would be run."""
    with experiment:
        experiment.dryrun(log=False)  # its log is wrapped to the terminal, and no script any more
        infos = [
            info
            for job in experiment.jobs
            for info in (job._dryrun_infos if isinstance(job, JobGroup) else [job._dryrun_info])
        ]
    return "\n".join(
        info.request.materialize() if isinstance(info.request, SlurmBatchRequest) else _commands(info.request)
        for info in infos
    )


def _commands(request: PopenRequest) -> str:
    return "\n".join(shlex.join(replica.args) for role in request.role_params.values() for replica in role)


def launch(experiment: run.Experiment) -> None:
    """Run it and follow its logs. ConfigError when sbatch does not take it."""
    try:
        with experiment:
            experiment.run(detach=False, tail_logs=True)
    except UnexpectedExit as failure:
        reason = (failure.result.stderr.strip().splitlines() or [f"exit code {failure.result.exited}"])[-1]
        raise ConfigError(f"the job was not submitted: {reason}; mend the options that it names") from None


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as those of `rlad`."""
    options = option_parser().parse_intermixed_args(arguments)
    try:
        config = load_run(options.recipe, options.overrides)
        check(config, options)
        return _run(config, options)
    except RladError as error:
        print(f"rlad: {error}", file=sys.stderr)
        return USER_ERROR


def _run(config: RunConfig, options: argparse.Namespace) -> int:
    given = [options.recipe, *options.overrides]
    # What NeMo-Run says is no part of the script that --dryrun prints.
    with contextlib.redirect_stdout(sys.stderr):
        if options.executor == "local":
            experiment = local_experiment(config, given, options.python)
        else:
            experiment = slurm_experiment(config, given, options)
        script = dryrun(experiment) if options.dryrun else ""
    if options.dryrun:
        print_out(f"{script}\n")
        return 0
    launch(experiment)
    return 0 if all(job.state == AppState.SUCCEEDED for job in experiment.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
