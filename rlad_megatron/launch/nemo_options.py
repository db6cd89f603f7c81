"""The options of `rlad-nemo`, and what it refuses before NeMo-Run is asked. Needs no `nemo_run`."""

from __future__ import annotations

import argparse
import math
import re
import shutil
from pathlib import Path

from rlad_megatron.command import CommandParser
from rlad_megatron.config import RunConfig, validate
from rlad_megatron.config.recipe import recipe_names
from rlad_megatron.errors import ConfigError
from rlad_megatron.launch.placement import check_job
from rlad_megatron.launch.slurm import check_seen_run_dir, warn_of_shortage
from rlad_megatron.plan.placement import check_one_machine, total_nodes

_SIGNAL = "B:USR1@"


def option_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="rlad-nemo",
        description="Launch a recipe with NeMo-Run, on this machine or as one Slurm job, and follow its logs until it "
        "ends. Run it in the folder of the repository, which all nodes have to see.",
        epilog="example: rlad-nemo math_r1_distill_7b_from_32b --executor slurm --partition gpu name=first",
    )
    parser.add_argument("recipe", metavar="RECIPE", help=f"one of: {', '.join(recipe_names())}; or a YAML file")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],  # or argparse would call it required where RECIPE is missing
        help="change a field, for example train.steps=20 (`rlad show RECIPE` lists the keys)",
    )
    parser.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="local: `rlad train` on this machine, with its ranks and servers; slurm: a job whose task groups are the "
        "trainer, the teacher if it has ranks of its own, and the rollout servers (default: local)",
    )
    parser.add_argument(
        "--dryrun", action="store_true", help="print the command (local) or the sbatch script (slurm), and run nothing"
    )
    parser.add_argument(
        "--python",
        metavar="FILE",
        default=".venv/bin/python",
        help="python of the trainer's environment, on the nodes or in the container (default: %(default)s)",
    )
    slurm = parser.add_argument_group("with --executor slurm")
    slurm.add_argument("--account", metavar="NAME", help="as sbatch's (default: yours)")
    slurm.add_argument("--partition", metavar="NAME", help="as sbatch's (default: the cluster's)")
    slurm.add_argument(
        "--nodes", metavar="N", type=int, default=0, help="of the job (default: as many as the run needs)"
    )
    slurm.add_argument(
        "--gpus-per-node", metavar="N", type=int, help="of the job (default: train.gpus_per_node; 0: ask for none)"
    )
    slurm.add_argument(
        "--time",
        metavar="[DAYS-]HH:MM:SS",
        default="24:00:00",
        help="limit of the job, or another of sbatch's forms (default: %(default)s)",
    )
    slurm.add_argument(
        "--signal",
        metavar="B:USR1@SECONDS",
        default="B:USR1@1800",
        help="the run is told to stop so long before --time, saves a checkpoint and is requeued; more SECONDS than a "
        "step takes, and less than --time (default: %(default)s)",
    )
    slurm.add_argument(
        "--container-image",
        metavar="IMAGE",
        default="",
        help="for pyxis: a squashfs file, or an image of a registry (default: no container)",
    )
    slurm.add_argument(
        "--container-mounts",
        metavar="HOST:CONTAINER[,...]",
        default="/dev/shm:/dev/shm",
        help="beside this folder, which is always mounted: where models, prompts and runs lie elsewhere "
        "(default: %(default)s, over which servers on the trainer's nodes get their weights)",
    )
    return parser


def check(config: RunConfig, options: argparse.Namespace) -> None:
    """Raise a ConfigError where nothing should be launched."""
    validate(config)
    if options.executor == "local":
        check_one_machine(config)
        options.python = interpreter(options.python)
        return
    options.nodes = options.nodes or total_nodes(config)
    gpus = config.train.gpus_per_node if options.gpus_per_node is None else options.gpus_per_node
    options.gpus_per_node = gpus
    check_job(config, options.nodes, gpus)
    if not options.dryrun:
        check_seen_run_dir(config)
    warn_of_shortage(config)
    if not re.fullmatch(rf"{_SIGNAL}\d+", options.signal):
        raise ConfigError(f"--signal={options.signal}: the run is told by USR1 to its script; write {_SIGNAL}SECONDS")
    # With less Slurm would send the signal at once, when NeMo-Run's script does not know it yet and is ended by it.
    if int(options.signal.removeprefix(_SIGNAL)) >= limit_s(options.time):
        raise ConfigError(
            f"--time={options.time} is not longer than the seconds of --signal={options.signal}, before which the run "
            "is told to stop; use a longer --time or an earlier --signal"
        )
    folder = str(config.run_dir.resolve())
    if not re.fullmatch(r"[\w./+@%:,-]+", folder, flags=re.ASCII):
        raise ConfigError(
            f"runs_dir={config.runs_dir}, name={config.name}: NeMo-Run's scripts take no spaces and no special "
            f"characters in paths, got {folder}; use letters, digits, '.', '_' and '-'"
        )
    image = options.container_image
    if image.endswith(".sqsh") and not image.startswith(("/", ".")):
        raise ConfigError(f"--container-image={image}: pyxis takes that for an image of a registry; write ./{image}")
    if image and "/" in options.python and not options.python.startswith("/"):
        raise ConfigError(
            f"--python={options.python} is a file of the host; with --container-image give the container's python "
            "(/opt/rlad/bin/python in the Dockerfile's)"
        )
    if image.startswith(("/", ".")) and not Path(image).exists():
        raise ConfigError(f"--container-image={image}: no such file; build it (docs/operations.md) or mend the path")
    if not image:
        options.python = interpreter(options.python)
    if not options.dryrun and shutil.which("sbatch") is None:
        raise ConfigError(
            "--executor slurm: no Slurm on this machine (sbatch not found); launch from a login node, or use --dryrun"
        )


def limit_s(time: str) -> float:
    """Seconds of a time limit in one of sbatch's forms; ConfigError for what is none."""
    if time.lower() in ("unlimited", "infinite"):
        return math.inf
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time, re.ASCII):
        raise ConfigError(
            f"--time={time} is no time limit; Slurm's forms: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, "
            "DAYS-HOURS, DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS or UNLIMITED"
        )
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def interpreter(python: str) -> str:
    """The absolute path of the trainer's python; ConfigError if it is not there."""
    path = Path(python).absolute()  # not resolved: a link into a virtual environment means that environment
    if not path.is_file():
        raise ConfigError(f"--python={python}: no such file; name the python of the trainer's environment (make setup)")
    return str(path)
