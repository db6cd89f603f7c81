"""The options of `rlad-nemo` and their checks. Needs no `nemo_run`."""

from __future__ import annotations

import argparse
import math
import re
import shutil
from pathlib import Path

from rlad_megatron.command import CommandParser
from rlad_megatron.config import RunConfig, validate
from rlad_megatron.config.placement import check_one_machine, total_nodes
from rlad_megatron.config.recipe import recipe_names
from rlad_megatron.errors import ConfigError
from rlad_megatron.launch.allocation import check_submission

SLURM_OPTIONS = (  # name, metavar, default, help
    ("account", "NAME", None, "as sbatch's (default: yours)"),
    ("partition", "NAME", None, "as sbatch's (default: the cluster's)"),
    ("nodes", "N", 0, "nodes of the job (default: as many as the run needs)"),
    ("gpus-per-node", "N", None, "GPUs on each node (default: train.gpus_per_node; 0: none)"),
    (
        "time",
        "[DAYS-]HH:MM:SS",
        "24:00:00",
        "time limit, in any of sbatch's formats (default: %(default)s)",
    ),
    (
        "signal",
        "B:USR1@SECONDS",
        "B:USR1@1800",
        "SECONDS before --time the run is told to stop, saves a checkpoint and is requeued; must be more than a "
        "step takes and less than --time (default: %(default)s)",
    ),
    ("container-image", "IMAGE", "", "for pyxis: a squashfs file or a registry's image (default: no container)"),
    (
        "container-mounts",
        "HOST:CONTAINER[,...]",
        "/dev/shm:/dev/shm",
        "in addition to this folder, for models, prompts and runs elsewhere (default: %(default)s, through which "
        "servers on the trainer's nodes get their weights)",
    ),
)


def option_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="rlad-nemo",
        description="Launch a recipe with NeMo-Run, on this machine or as one Slurm job, and follow its logs until it "
        "ends. Run it in the folder of the repository, which all nodes must see. A Slurm job and its requeues keep the "
        "configuration of the launch (runs/.submitted/): later edits of the recipe do not change it.",
        epilog="example: rlad-nemo math_r1_distill_7b_from_32b --executor slurm --partition gpu name=first",
    )
    parser.add_argument("recipe", metavar="RECIPE", help=f"one of: {', '.join(recipe_names())}; or a YAML file")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],  # otherwise argparse calls it required when RECIPE is missing
        help="change a field, for example train.steps=20 (`rlad show RECIPE` lists the keys)",
    )
    parser.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="local: `rlad train` on this machine, with its ranks and servers; slurm: a job whose task groups are the "
        "trainer, a dedicated teacher and the rollout servers (default: local)",
    )
    parser.add_argument(
        "--dryrun",
        action="store_true",
        help="print the command (local) or the sbatch script (slurm), and run nothing",
    )
    parser.add_argument(
        "--python",
        metavar="FILE",
        default=".venv/bin/python",
        help="Python of the trainer's environment, on the nodes or in the container (default: %(default)s)",
    )
    slurm = parser.add_argument_group("with --executor slurm")
    for name, metavar, default, text in SLURM_OPTIONS:
        kind = int if metavar == "N" else str
        slurm.add_argument(f"--{name}", metavar=metavar, type=kind, default=default, help=text)
    return parser


def check(config: RunConfig, options: argparse.Namespace) -> None:
    """Raise ConfigError for a launch that cannot work. Resolves the defaults of `options` in place."""
    validate(config)
    if options.executor == "local":
        for name, _, default, _ in SLURM_OPTIONS:
            if (given := getattr(options, name.replace("-", "_"))) != default:
                raise ConfigError(f"--{name}={given} is for jobs; add --executor slurm, or leave it out")
        check_one_machine(config)
        options.python = interpreter(options.python)
        return
    options.nodes = options.nodes or total_nodes(config)
    if options.gpus_per_node is None:
        options.gpus_per_node = config.train.gpus_per_node
    check_submission(config, options.nodes, options.gpus_per_node, run_dir=not options.dryrun)
    signal = re.fullmatch(r"B:USR1@(\d+)", options.signal)
    if not signal:
        raise ConfigError(f"--signal={options.signal}: the batch script listens for USR1; write B:USR1@SECONDS")
    # Otherwise Slurm sends the signal immediately, and kills NeMo-Run's script before it sets its trap.
    if int(signal[1]) >= limit_s(options.time):
        raise ConfigError(
            f"--time={options.time} must be longer than the seconds in --signal={options.signal}, which are before the "
            "limit; use a longer --time or fewer seconds"
        )
    folder = str(config.run_dir.resolve())
    if not re.fullmatch(r"[\w./+@%:,-]+", folder, flags=re.ASCII):
        raise ConfigError(
            f"runs_dir={config.runs_dir}, name={config.name}: NeMo-Run's scripts allow no spaces and no special "
            f"characters in paths, got {folder}; use letters, digits, '.', '_' and '-'"
        )
    image = options.container_image
    if image.endswith(".sqsh") and not image.startswith(("/", ".")):
        raise ConfigError(f"--container-image={image}: pyxis takes that for a registry's image; write ./{image}")
    if image and "/" in options.python and not options.python.startswith("/"):
        raise ConfigError(
            f"--python={options.python} is a file of the host; with --container-image give the container's Python "
            "(/opt/rlad/bin/python in the Dockerfile's)"
        )
    if image.startswith(("/", ".")) and not Path(image).exists():
        raise ConfigError(f"--container-image={image}: no such file; build it (docs/operations.md) or fix the path")
    if not image:
        options.python = interpreter(options.python)
    if not options.dryrun and shutil.which("sbatch") is None:
        raise ConfigError(
            "--executor slurm: no Slurm on this machine (sbatch not found); launch from a login node, or use --dryrun"
        )


def limit_s(time: str) -> float:
    """Seconds of a time limit in any of sbatch's formats. Raises ConfigError for anything else."""
    if time.lower() in ("unlimited", "infinite"):
        return math.inf
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time, re.ASCII):
        raise ConfigError(
            f"--time={time} is not a time limit; Slurm's formats: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, "
            "DAYS-HOURS, DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS or UNLIMITED"
        )
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def interpreter(python: str) -> str:
    """The absolute path of the trainer's Python. Raises ConfigError if it does not exist."""
    path = Path(python).absolute()  # not resolved: the link in a virtual environment selects that environment
    if not path.is_file():
        raise ConfigError(f"--python={python}: no such file; give the Python of the trainer's environment (make setup)")
    return str(path)
