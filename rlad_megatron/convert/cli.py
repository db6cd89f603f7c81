"""`rlad convert`: its arguments and verbs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from rlad_megatron.config.dtypes import DTYPES
from rlad_megatron.errors import CheckpointError, ConfigError

# torch and Megatron-Core are imported inside the functions, so that --help and missing paths answer at once.

EPILOG = """\
examples:
  rlad convert hf-to-megatron Qwen3-32B megatron/Qwen3-32B --tp 8 --pp 2
  rlad convert megatron-to-hf megatron/Qwen3-32B Qwen3-32B-back --processes 4
  rlad convert hf-to-hf Qwen3.5-2B Qwen3.5-2B-text
  rlad convert hf-to-hf runs/mine/hf Qwen3.5-2B-mine --like Qwen3.5-2B
  rlad convert reshard megatron/Qwen3-32B megatron/Qwen3-32B-tp4 --tp 4
  rlad convert verify Qwen3-32B megatron/Qwen3-32B
  rlad convert inspect megatron/Qwen3-32B
"""
CONFIG_HELP = "folder with config.json and tokenizer files, if the Megatron folder has none"


def add_parser(commands) -> None:
    """Add `convert` to the sub-commands of `rlad`."""
    parser = commands.add_parser(
        "convert",
        help="convert checkpoints: Hugging Face <-> Megatron, reshard, verify, inspect",
        description="Convert checkpoints between Hugging Face and Megatron (torch_dist), tensor by tensor.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_verbs(parser)


def add_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")

    to_megatron = add("hf-to-megatron", "write a Megatron checkpoint from a Hugging Face folder")
    to_hf = add("megatron-to-hf", "write a Hugging Face folder from a Megatron checkpoint")
    hf_to_hf = add("hf-to-hf", "write the text model of a Hugging Face folder, or with --like a whole model again")
    reshard = add("reshard", "write a Megatron checkpoint for another layout")
    dtypes = ("keep", *(dtype.name for dtype in DTYPES))
    for name, verb in (
        ("hf-to-megatron", to_megatron),
        ("megatron-to-hf", to_hf),
        ("hf-to-hf", hf_to_hf),
        ("reshard", reshard),
    ):
        verb.add_argument("source", help="folder to read")
        verb.add_argument("target", help="folder to write; must not exist, or be empty")
        verb.add_argument("--config", metavar="FOLDER", help=CONFIG_HELP)
        verb.add_argument("--dtype", default="keep", choices=dtypes, help="of the written weights (keep: as read)")
        verb.add_argument(
            "--processes", type=int, default=1, metavar="N", help="on this machine, each writes its share (1)"
        )
        verb.add_argument(
            "--dry-run", action="store_true", help="print what would be written and the memory it needs, write nothing"
        )
        verb.add_argument("--no-verify", action="store_true", help="skip the comparison at the end")
        verb.set_defaults(run=_convert, verb=name, after_interrupt="nothing was left behind; start it again")
    for verb in (to_megatron, reshard):
        verb.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size (1)")
        verb.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline-parallel size (1)")
        verb.add_argument("--vpp", type=int, default=1, metavar="N", help="virtual pipeline chunks of a stage (1)")
        verb.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel size (1)")
        verb.add_argument("--iteration", metavar="N", help="number or release (release; reshard: that of the source)")
    for verb in (to_hf, hf_to_hf):
        verb.add_argument(
            "--shard-size", default="5GB", metavar="SIZE", help="largest safetensors file, e.g. 500MB (5GB)"
        )
        verb.add_argument(
            "--like",
            metavar="FOLDER",
            help="a model with a vision tower or layers for multi-token prediction: write a whole model like it, with "
            "those weights and its config.json",
        )

    verify = add("verify", "compare two checkpoints, in either format")
    for name in ("first", "second"):
        verify.add_argument(name, help="folder, of either format")
    verify.add_argument("--config", metavar="FOLDER", help=CONFIG_HELP)
    verify.add_argument("--sample", action="store_true", help="one layer of each kind of parameter, instead of all")
    verify.add_argument("--logits", action="store_true", help="also run both models (Hugging Face and Megatron)")
    verify.add_argument("--tokens", metavar="IDS", help="for --logits: token ids, comma-separated (32 random ones)")
    verify.add_argument(
        "--tp", type=int, default=1, metavar="N", help="for --logits: tensor-parallel size of the Megatron model (1)"
    )
    verify.add_argument(
        "--bound", type=float, default=1e-4, metavar="X", help="for --logits: largest difference (1e-4)"
    )
    verify.set_defaults(run=_verify, after_interrupt="start it again")

    inspect = add("inspect", "print names, shapes, dtypes, layout and sizes")
    inspect.add_argument("folder", help="a checkpoint in either format")
    inspect.set_defaults(run=_inspect, after_interrupt="start it again")


def _convert(options: argparse.Namespace) -> int:
    _check_there(options.source, options.config, getattr(options, "like", None))
    from rich.console import Console

    from rlad_megatron.convert.run import convert
    from rlad_megatron.convert.tables import print_dry_run
    from rlad_megatron.convert.targets import open_target
    from rlad_megatron.models.config_json import print_unknown_fields

    console = Console()
    conversion = conversion_from(options)
    print_unknown_fields(conversion.config, conversion.spec)
    if options.dry_run:
        print_dry_run(console, open_target(conversion))
        return 0
    convert(conversion, console, verify=not options.no_verify)
    return 0


def conversion_from(options: argparse.Namespace):
    """The conversion that the arguments describe.

    Raises:
        CheckpointError: the source is not in the format that the verb reads.
        ConfigError: --iteration or --shard-size is not a number, or there is no config.json.
    """
    from rlad_megatron.convert.layout import CheckpointLayout
    from rlad_megatron.convert.targets import Conversion
    from rlad_megatron.models.megatron_folder import RELEASE, find_iteration, is_megatron
    from rlad_megatron.models.safetensors_files import MAX_SHARD_BYTES

    megatron = is_megatron(options.source)
    if megatron and options.verb.startswith("hf-"):
        raise CheckpointError(
            f"{options.source}: a Megatron checkpoint, but {options.verb} reads a Hugging Face folder; use reshard or "
            "megatron-to-hf"
        )
    if not megatron and not options.verb.startswith("hf-"):
        raise CheckpointError(
            f"{options.source}: no Megatron checkpoint, which {options.verb} reads; for a Hugging Face folder use "
            "hf-to-megatron"
        )
    to_hf = options.verb.endswith("-to-hf")
    like = options.like if to_hf else None
    iteration = RELEASE
    if not to_hf:
        iteration = options.iteration or (find_iteration(options.source)[1] if megatron else RELEASE)
        if iteration != RELEASE and not iteration.isdigit():
            raise ConfigError(f"--iteration {iteration!r} must be a number or {RELEASE!r}")
    return Conversion(
        options.source,
        options.target,
        config_folder(like or options.config, options.source),
        None if to_hf else CheckpointLayout(options.tp, options.pp, options.vpp, options.ep),
        options.dtype,
        options.processes,
        iteration,
        parse_size(options.shard_size) if to_hf else MAX_SHARD_BYTES,
        like,
    )


def _check_there(*folders: str | None) -> None:
    for folder in folders:
        if folder is not None and not Path(folder).is_dir():
            raise CheckpointError(f"{folder}: not found; give a folder")


def config_folder(given: str | None, *checkpoints: str) -> str:
    """The folder with config.json: `given`, or the first checkpoint that has one."""
    if given:
        return given
    for folder in checkpoints:
        if (Path(folder) / "config.json").is_file():
            return folder
    raise ConfigError(f"{checkpoints[0]}: no config.json there; give the Hugging Face model's folder with --config")


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "20K". Powers of ten. The unit is required: a bare 5 would mean bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper())) if match else 0
    if size < 1:
        raise ConfigError(f"--shard-size {text!r} is not a size; write for example 5GB or 500MB")
    return size


def _verify(options: argparse.Namespace) -> int:
    _check_there(options.first, options.second, options.config)
    from rich.console import Console

    from rlad_megatron.convert.logits import prepare_comparison
    from rlad_megatron.convert.run import verify_folders
    from rlad_megatron.models.config_json import print_unknown_fields, read_model_spec
    from rlad_megatron.models.megatron_folder import is_megatron

    console = Console()
    # The Megatron model is built from the config.json next to it; transformers reads its own.
    folders = sorted((options.first, options.second), key=is_megatron, reverse=True)
    config = config_folder(options.config, *folders)
    spec = read_model_spec(config)
    print_unknown_fields(config, spec)
    comparison = None
    if options.logits:
        comparison = prepare_comparison(options.first, options.second, spec, tokens=options.tokens, tp=options.tp)
    verify_folders(console, options.first, options.second, spec, sample=options.sample)
    if comparison:
        comparison.verify(console, options.bound)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    _check_there(options.folder)
    from rich.console import Console

    from rlad_megatron.convert.tables import print_tensors

    print_tensors(Console(), options.folder)
    return 0
