"""The `rlad` command."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import rlad_megatron
from rlad_megatron.command import CommandParser, add_command, print_out
from rlad_megatron.config import RunConfig, validate
from rlad_megatron.config.placement import check_one_machine
from rlad_megatron.config.recipe import load_run, recipe_names, recipe_purpose, to_yaml
from rlad_megatron.convert.cli import add_parser as add_convert
from rlad_megatron.errors import USER_ERROR, ConfigError, RladError, file_error
from rlad_megatron.launch.study import add_study
from rlad_megatron.trainer.run_state import CONFIG, latest_step, write_whole

RECIPE_HELP = "a recipe: recipes/NAME.py, NAME, or a YAML file written by `rlad show`"
OVERRIDE_HELP = "set a field by its dotted key, for example train.steps=20; `rlad show RECIPE` lists the keys"

SOURCE_HELP = "what data.source may be (then also give student.path, for its tokenizer), or a recipe"

PORT = 8470  # of `rlad watch`
BENCH_HELP = "count time with the figures of `rlad bench RECIPE --output FILE`; may be repeated, the last one counts"
RESPONSES_HELP = "tokens of responses, for time: mean and spread of the logarithm (4000,0.7), or a run's folder"
TEACHER_GAP_HELP = (
    "instead, score the rollouts in runs/NAME/ with the teacher, in its own precision and in a higher one (bf16 for "
    "FP8, otherwise fp32); print how far the log-probs differ and how many clip and clamp decisions change"
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 success, 1 a bug, 2 an error the user can fix (one line on stderr), 130 Ctrl-C,
    143 SIGTERM.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if "overrides" in options:
        # argparse leaves overrides after an option in `rest`; anything else in it is refused as an override.
        options.overrides = [*options.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options)
    except RladError as error:
        print(f"rlad: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        refusal = file_error(error, "a file of this run")
        if refusal is None:
            raise
        print(f"rlad: {refusal}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        print(f"rlad: interrupted; {options.after_interrupt}", file=sys.stderr)
        return 128 + getattr(interrupt, "signum", signal.SIGINT)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="rlad",
        description="Distil a large reasoning teacher into a small student during RL, on Megatron-Core and vLLM.",
        epilog=f"`rlad COMMAND --help` describes each command. Recipes: {', '.join(recipe_names())}.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {rlad_megatron.__version__}")
    parser.set_defaults(after_interrupt="start it again")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for run in (_train, _sft, _evaluate, _plan, _bench, _show):
        command = add_command(commands, run)
        command.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
        # Without a default argparse would report it as required when RECIPE is missing.
        command.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=OVERRIDE_HELP)
        if run is _evaluate:
            result = command.add_mutually_exclusive_group()
            result.add_argument("--teacher-gap", action="store_true", help=TEACHER_GAP_HELP)
            result.add_argument("--output", type=_output, help="also write the figures to this JSON file")
        if run is _plan:
            command.add_argument("--bench", type=Path, action="append", default=[], metavar="FILE", help=BENCH_HELP)
            command.add_argument("--responses", default="", metavar="MEAN,SPREAD|RUN", help=RESPONSES_HELP)
        if run is _bench:
            command.add_argument("--steps", type=_count, default=3, help="steps to measure (%(default)s)")
            only = command.add_mutually_exclusive_group()
            only.add_argument("--teacher-only", action="store_true", help="measure only the teacher's ranks")
            only.add_argument("--servers-only", action="store_true", help="measure only decoding by a rollout server")
            command.add_argument("--output", type=_output, help="also write the figures to this JSON file")
    command = add_command(commands, _generate)
    command.add_argument("model", metavar="MODEL", help="a Hugging Face folder")
    command.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    command.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=OVERRIDE_HELP)
    command.add_argument(
        "--keep", choices=("solved", "all"), default="solved", help="responses to write (default: %(default)s)"
    )
    command.add_argument("--prompts", type=_count, metavar="N", help="only the first N training prompts")
    command.add_argument("--samples", type=_count, metavar="N", help="responses to each (default: rollout.group_size)")
    command.add_argument("--output", type=_output, help="the file (default: runs/NAME/generate/MODEL.jsonl)")
    command = add_command(commands, _data)
    command.add_argument("source", metavar="SOURCE|RECIPE", help=SOURCE_HELP)
    command.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=OVERRIDE_HELP)
    command = add_command(commands, _watch)
    command.add_argument("folder", metavar="RUN", type=Path, help="a run's folder, runs/NAME; it may not exist yet")
    command.add_argument("--port", type=_port, default=PORT, help="0: a free one (%(default)s)")
    add_study(commands, main)
    add_command(commands, _doctor)
    command = commands.add_parser("recipes", help="list the recipes", description="List the recipes, one per line.")
    command.set_defaults(run=_recipes)
    add_convert(commands)
    return parser


# The commands, whose docstrings are their help. Each imports what it needs, so that `rlad show` and errors in arguments
# are fast.


def _train(options: argparse.Namespace) -> int:
    """Train a student by RL with a teacher in the loss.

    Starts the rollout servers and the trainer's ranks on this machine. Writes runs/NAME/: config.yaml, metrics.jsonl,
    tensorboard/, checkpoints/, rollouts/, timeline.json, hf/ (the student) and report.html. After an interruption,
    continue with resume=true.
    """
    return _run_ranks("train", options)


def _sft(options: argparse.Namespace) -> int:
    """Fine-tune a model on traces.

    Minimizes cross-entropy on the JSONL file sft.traces, or on gold traces of the puzzles. Trains the model in
    student.path and writes it to runs/NAME/hf/.
    """
    return _run_ranks("sft", options)


def _evaluate(options: argparse.Namespace) -> int:
    """Measure a model's accuracy on held-out prompts.

    Serves student.path with vLLM and prints accuracy, Mean@K and Pass@K (K is eval.samples) by subset. For another
    model set student.path=FOLDER.
    """
    if options.teacher_gap:
        return _run_ranks("teacher_gap", options)
    config = _config_to_run(options)
    from rlad_megatron.evaluate import FOLDER, evaluate_model, print_accuracy
    from rlad_megatron.launch.lock import only_writer
    from rlad_megatron.launch.preflight import check_evaluate, check_writable
    from rlad_megatron.launch.scratch import scratch
    from rlad_megatron.launch.stop import stop_signals

    check_writable(config)
    with stop_signals(), only_writer(config.run_dir / FOLDER, "evaluate"), scratch():
        check_evaluate(config)
        metrics = evaluate_model(config, config.student.path)
        print_accuracy(config.student.path, metrics)
    if options.output:
        write_whole(options.output, json.dumps(metrics, indent=2) + "\n")
    return 0


def _generate(options: argparse.Namespace) -> int:
    """Write a model's responses to a recipe's training prompts.

    Serves MODEL with vLLM and samples responses as rollout.sampling says. Writes those that the reward finds solved as
    JSONL: traces that `rlad sft` learns from with sft.traces=FILE. Responses that were cut off are left out. Started
    again after an interruption, it goes on where it stopped.
    """
    options.overrides = [*options.overrides, f"student.path={options.model}"]
    config = _config_to_run(options)
    if options.samples:
        config = replace(config, rollout=replace(config.rollout, group_size=options.samples))
    from rlad_megatron.generate import FOLDER, generate_traces, output_path
    from rlad_megatron.launch.lock import only_writer
    from rlad_megatron.launch.preflight import check_generate, check_writable
    from rlad_megatron.launch.scratch import scratch
    from rlad_megatron.launch.stop import stop_signals

    output = options.output or output_path(config)
    if output.exists():
        raise ConfigError(f"{output} exists; delete it, or give another --output")
    check_writable(config)
    with stop_signals(), only_writer(config.run_dir / FOLDER, "generate"), scratch():
        check_generate(config)
        generate_traces(config, output, options.keep, options.prompts)
    return 0


def _plan(options: argparse.Namespace) -> int:
    """Show where everything runs and whether it fits.

    Needs no GPUs, weights or prompts. Prints which node holds what, and the memory on each
    GPU for weights, gradients, optimizer, activations, loss, teacher and KV cache; each line says whether it is exact
    or estimated. If a GPU needs more than train.gpu_memory_gb, the exit code is 2 and the error names the cheapest
    change that fits: fewest GPUs first, then least slowdown (docs/parallelism.md has the order of options and layouts).
    Model sizes come from config.json, or, for the recipes' models, from the folder's name. Runs on CPUs
    (train.gpus_per_node=0) are never refused. If it fits, the plan also estimates seconds of a step and idle shares,
    and names the split of the GPUs with the most tokens per GPU-hour (docs/planning.md); on CPUs only with --bench.
    """
    from rich.console import Console

    from rlad_megatron.plan.advice import cheapest_change
    from rlad_megatron.plan.count import make_plan
    from rlad_megatron.plan.table import print_plan
    from rlad_megatron.plan.time_table import estimate, print_time

    config = _config(options)
    plan = make_plan(config)
    estimated = estimate(plan, options.responses, options.bench)
    # A log file has no width.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    with console.capture() as printed:
        print_plan(plan, console)
        if estimated:
            print_time(plan, estimated, console)
    print_out(printed.get())
    if plan.shortage:
        change = cheapest_change(plan)
        remedy = f"the cheapest change that fits: {change}" if change else "no change fits, even on 8 times the nodes"
        raise ConfigError(f"{config.name} does not fit: {plan.shortage}; {remedy}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    """Measure steps of a run on synthetic rollouts.

    The first thing to run on a new machine. Starts the trainer's ranks, and those of a dedicated teacher, on this
    machine, but no servers, and needs no prompts. After a step to warm up it prints medians: MFU, tokens/s, peak
    memory, the teacher's tokens/s, and GB/s of weights through shared memory. Responses are of random tokens and of all
    lengths up to rollout.sampling.max_tokens; objective.name=grpo leaves the teacher out. Everything, with each step's
    metrics and bench.json, goes to runs/NAME/bench/. --servers-only starts one rollout server in place of the ranks
    and measures decoding (servers.json). `rlad plan --bench` counts with both files.
    """
    from rlad_megatron.config.bench import RESULT, bench_config

    if options.servers_only:
        return _bench_servers(options)

    config = bench_config(_config_to_run(options), options.steps)
    validate(config)
    check_one_machine(replace(config, rollout=replace(config.rollout, nodes=0)))
    from rlad_megatron.launch.local import run_local
    from rlad_megatron.launch.lock import only_writer
    from rlad_megatron.launch.preflight import check_bench, check_writable
    from rlad_megatron.launch.stop import stop_signals

    check_writable(config)
    with stop_signals(), only_writer(config.run_dir, "bench"):
        check_bench(config, teacher_only=options.teacher_only)
        code = run_local("bench_teacher" if options.teacher_only else "bench", config)
    if not code:
        _copy_result(config.run_dir / RESULT, options.output)
    return code


def _bench_servers(options: argparse.Namespace) -> int:
    from rlad_megatron.config.bench import SERVERS_RESULT, servers_bench_config

    config = servers_bench_config(_config_to_run(options), options.steps)
    from rlad_megatron.bench_servers import bench_servers
    from rlad_megatron.launch.lock import only_writer
    from rlad_megatron.launch.preflight import check_bench_servers, check_writable
    from rlad_megatron.launch.scratch import scratch
    from rlad_megatron.launch.stop import stop_signals

    check_writable(config)
    with stop_signals(), only_writer(config.run_dir, "bench"), scratch():
        check_bench_servers(config)
        bench_servers(config)
    _copy_result(config.run_dir / SERVERS_RESULT, options.output)
    return 0


def _copy_result(result: Path, output: Path | None) -> None:
    if output:
        shutil.copyfile(result, output)


def _output(text: str) -> Path:
    """A file that can be written. Its folder is made: what goes there takes a while."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written ({error.strerror})") from None
    return path


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}; use at least 1")
    return number


def _show(options: argparse.Namespace) -> int:
    """Print a recipe's resolved configuration.

    You can edit the YAML and use it as RECIPE.
    """
    print_out(to_yaml(_config(options)))
    return 0


def _data(options: argparse.Namespace) -> int:
    """Show what a run would see of its data.

    Reads the whole data, without a GPU: counts, lengths in tokens, what is too long, duplicates within and between
    training and held-out prompts, answers that the reward cannot read, and three prompts as the model sees them. It
    also fills the cache of a data set of the Hugging Face hub.
    """
    from rich.console import Console

    from rlad_megatron.show_data import data_config, print_data

    config = data_config(options.source, options.overrides)
    validate(config)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    with console.capture() as printed:
        print_data(config, console)
    print_out(printed.get())
    return 0


def _watch(options: argparse.Namespace) -> int:
    """Show a run in the browser while it goes on.

    Serves a page on 127.0.0.1 that follows the run folder: curves, advisories, load of the servers, and sample rollouts
    with their tokens coloured by teacher gap, clip state, advantage or mismatch. It only reads, and needs no network.
    For a run on a cluster, start it on a host that sees the folder, and forward the port with `ssh -L`.
    """
    from rlad_megatron.watch.server import watch

    watch(options.folder, options.port)
    return 0


def _port(text: str) -> int:
    if not 0 <= (number := int(text)) < 65536:
        raise argparse.ArgumentTypeError(f"{number} is no port; use 1 to 65535, or 0 for a free one")
    return number


def _doctor(options: argparse.Namespace) -> int:
    """Say what is wrong with this machine, and what to do.

    Checks versions of Python, torch, CUDA, NCCL, Transformer Engine, vLLM and Megatron-Core against each other, GPUs
    and how they are linked, ports, /dev/shm and disk; in a Slurm job of several nodes also their clocks and whether
    they share this folder. Runs where torch is missing too. Exit code 1: something is wrong.
    """
    from rich.console import Console

    from rlad_megatron.launch.doctor import examine
    from rlad_megatron.launch.findings import print_findings

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    with console.capture() as printed:
        code = print_findings(examine(os.environ), console)
    print_out(printed.get())
    return code


def _recipes(options: argparse.Namespace) -> int:
    print_out("".join(f"{name:<32} {recipe_purpose(name)}\n" for name in recipe_names()))
    return 0


def _config_to_run(options: argparse.Namespace) -> RunConfig:
    """The same, for a command that starts processes. torch cannot be imported without a temporary folder."""
    config = _config(options)
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError(f"{error.strerror}; free some space there, or set TMPDIR") from None
    return config


def _config(options: argparse.Namespace) -> RunConfig:
    """The validated configuration. Imports no torch, so bad input fails fast."""
    config = load_run(options.recipe, options.overrides)
    validate(config)
    return config


def _run_ranks(verb: str, options: argparse.Namespace) -> int:
    config = _config_to_run(options)
    check_one_machine(config)
    from rlad_megatron.evaluate import FOLDER
    from rlad_megatron.launch import preflight
    from rlad_megatron.launch.local import run_local
    from rlad_megatron.launch.lock import only_writer
    from rlad_megatron.launch.stop import stop_signals

    checks = {"train": preflight.check_train, "sft": preflight.check_sft, "teacher_gap": preflight.check_teacher_gap}
    preflight.check_writable(config)
    # The teacher's gap can be measured while the run goes on.
    folder = config.run_dir / FOLDER if verb == "teacher_gap" else config.run_dir
    go_on = f"continue with: rlad {verb} {shlex.quote(str(config.run_dir / CONFIG))} resume=true"
    try:
        with stop_signals(), only_writer(folder, verb):
            checks[verb](config)
            code = run_local(verb, config)
            if code:
                step = latest_step(config.run_dir / "checkpoints")
                print(f"rlad: stopped after step {step or 0}; {go_on}", file=sys.stderr)
            return code
    except KeyboardInterrupt:
        if (config.run_dir / CONFIG).exists() and verb != "teacher_gap":
            options.after_interrupt = go_on
        raise


if __name__ == "__main__":
    sys.exit(main())
