"""Streaming conversion against naive conversion, on the same checkpoint in one run.

    python benchmarks/convert.py                      # makes a model of 1.5 GB in a temporary folder
    python benchmarks/convert.py --model FOLDER       # any Hugging Face folder

Each method runs in a separate process, in a different order in every round. Seconds are medians over the rounds; the
ratio to the naive method is the median of the ratios within a round. The naive method loads everything with
transformers, builds the whole state dict (Megatron's or Hugging Face's) and saves it. Memory is the kernel's peak of
resident memory (VmHWM), which includes mapped files, of the process that uses most, above its level with all modules
imported. The layout is TP 1, the worst case for memory: there a chunk is a whole parameter. All files are in the page
cache. Results go to benchmarks/results/convert.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from measure import machine, median_ratio, reset_peak, status_bytes
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter, save
from transformers import AutoModelForCausalLM, Qwen3Config

from rlad_megatron.config import LayoutConfig
from rlad_megatron.convert.layout import CheckpointLayout
from rlad_megatron.convert.run import convert
from rlad_megatron.convert.targets import Conversion, open_target
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.models.megatron_tensors import model_blocks
from rlad_megatron.models.safetensors_files import SafetensorsFiles
from rlad_megatron.models.shard_plan import build_shard_plan

RESULT = Path(__file__).parent / "results" / "convert.json"
LAYOUT = CheckpointLayout(1, 1)
RESHARDED = CheckpointLayout(2, 2)
NAIVE = "naive, 1 process"


def make_model(folder: Path) -> None:
    """A Qwen3 with the sizes of Qwen3-0.6B in bf16: 1.5 GB. The embedding is a fifth of it."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["Qwen3ForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shapes = build_shard_plan(config, LayoutConfig()).hf_shapes
    files = SafetensorsFiles(folder, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}, 5 * 10**8)
    files.create()
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        files.write(name, torch.randn(shape, generator=generator) * 0.02)


def naive_to_megatron(model: str, target: str) -> None:
    """Whole model in memory, whole Megatron state dict in memory, one save."""
    state = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    stacked: dict[str, torch.Tensor] = {}
    for block in model_blocks(read_model_spec(model)):
        tensor = torch.zeros(block.stored_shape(LAYOUT.tensor_parallel), dtype=next(iter(state.values())).dtype)
        for piece in block.pieces:
            local, hf = (tuple(slice(*s) for s in slices) for slices in (piece.local_slices, piece.hf_slices))
            tensor[local] = state[piece.hf_name][hf]
        stacked[f"{block.key}{block.index}"] = tensor
    save(stacked, storage_writer=FileSystemWriter(target), no_dist=True)


def naive_to_hf(model: str, megatron: str, target: str) -> None:
    """Whole Megatron checkpoint in memory, whole Hugging Face state dict in memory, one save."""
    spec = read_model_spec(model)
    source = open_target(Conversion(megatron, target, model, None)).source
    blocks = {(block.key, block.index): source.read_block(block) for block in model_blocks(spec)}
    state: dict[str, torch.Tensor] = {}
    shapes = build_shard_plan(spec, LayoutConfig()).hf_shapes
    for block in model_blocks(spec):
        for piece in block.pieces:
            if piece.hf_name not in state:
                state[piece.hf_name] = torch.empty(shapes[piece.hf_name], dtype=blocks[block.key, block.index].dtype)
            local, hf = (tuple(slice(*s) for s in slices) for slices in (piece.local_slices, piece.hf_slices))
            state[piece.hf_name][hf] = blocks[block.key, block.index][local]
    Path(target).mkdir()
    save_file(state, Path(target) / "model.safetensors", metadata={"format": "pt"})


def streaming(source: str, target: str, model: str, layout: CheckpointLayout | None, processes: int) -> None:
    convert(Conversion(source, target, model, layout, processes=processes), Console(quiet=True), verify=False)


class PeakMemory:
    """The largest peak (VmHWM) of this process and its children, above the level at the start.

    A fork starts without its parent's file pages, so the library pages that it touches count as its own.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._base, self._forked_base = (status_bytes("self", field) for field in ("VmRSS", "RssAnon"))
        reset_peak()  # of the imports
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _look(self) -> None:
        self.bytes = max(self.bytes, status_bytes("self", "VmHWM") - self._base)
        for process in self._process.children():
            try:
                self.bytes = max(self.bytes, status_bytes(process.pid, "VmHWM") - self._forked_base)
            except (FileNotFoundError, IndexError):  # it has exited
                continue

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._look()

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._stop.set()
        self._thread.join()
        self._look()


def _measure(function, arguments: tuple, pipe) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1)))
    with PeakMemory() as peak:
        started = time.perf_counter()
        function(*arguments)
        os.sync()
        seconds = time.perf_counter() - started
    pipe.send((seconds, peak.bytes))


def measure(function, *arguments) -> tuple[float, int]:
    """(seconds, peak bytes) of a call in a fresh process, until the result is on disk."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(function, arguments, theirs))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    finally:
        process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face folder (default: a random model)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlad_convert_") as folder:
        base = Path(folder)
        model = options.model or str(base / "model")
        if not options.model:
            make_model(base / "model")
        megatron, out = str(base / "megatron"), str(base / "out")
        streaming(model, megatron, model, LAYOUT, 2)  # input of the other directions; also warms the page cache
        target = open_target(Conversion(model, out, model, LAYOUT))
        runs = measure_rounds(methods_of(model, megatron, out), options.repeats, out)
        largest = target.conversion.largest(target.source)
        report(runs, model if options.model else "random Qwen3-0.6B, untied, bf16", target.total, largest)


def methods_of(model: str, megatron: str, out: str) -> dict[tuple[str, str], tuple]:
    """(direction, method) -> (function, arguments). Each writes the folder `out`."""
    methods = {
        ("hf-to-megatron", NAIVE): (naive_to_megatron, model, out),
        ("megatron-to-hf", NAIVE): (naive_to_hf, model, megatron, out),
    }
    directions = {
        "hf-to-megatron": (model, LAYOUT),
        "megatron-to-hf": (megatron, None),
        "reshard": (megatron, RESHARDED),
    }
    for direction, (source, layout) in directions.items():
        for processes, name in ((1, "streaming, 1 process"), (2, "streaming, 2 processes")):
            methods[direction, name] = (streaming, source, out, model, layout, processes)
    return methods


def measure_rounds(methods: dict[tuple[str, str], tuple], rounds: int, out: str) -> dict[tuple[str, str], list]:
    """[(seconds, peak bytes)] of each method, one for each round."""
    runs: dict[tuple[str, str], list] = {key: [] for key in methods}
    keys = list(methods)
    for first in range(rounds):
        for key in keys[first % len(keys) :] + keys[: first % len(keys)]:
            shutil.rmtree(out, ignore_errors=True)
            function, *arguments = methods[key]
            runs[key].append(measure(function, *arguments))
    return runs


def report(runs: dict[tuple[str, str], list], model: str, total: int, largest: int) -> None:
    bound = 2 * largest / 1e6 + 300
    table = Table(
        "direction",
        "method",
        "s",
        "ratio to naive",
        "GB/s",
        "peak MB of a process",
        title=f"{model}, {total / 1e9:.2f} GB",
    )
    rows = []
    for (direction, method), values in sorted(runs.items()):
        all_seconds = [seconds for seconds, _ in values]
        seconds = statistics.median(all_seconds)
        naive = [seconds for seconds, _ in runs.get((direction, NAIVE), [])]
        row = {
            "direction": direction,
            "way": method,
            "seconds": round(seconds, 2),
            "of_naive": round(median_ratio(all_seconds, naive), 2) if naive else None,
            "gb_per_s": round(total / 1e9 / seconds, 3),
            "peak_mb": round(max(peak for _, peak in values) / 1e6, 1),
            "all_seconds": [round(value, 2) for value in all_seconds],
        }
        rows.append(row)
        table.add_row(direction, method, *(str(row[key]) for key in ("seconds", "of_naive", "gb_per_s", "peak_mb")))
    console = Console()
    console.print(table)
    console.print(f"bound on memory: 2 x {largest / 1e6:.1f} MB + 300 MB = {bound:.0f} MB")
    RESULT.parent.mkdir(exist_ok=True)
    result = {
        "command": " ".join(["python benchmarks/convert.py", *sys.argv[1:]]),
        "machine": machine() | {"memory_gb": round(psutil.virtual_memory().total / 1e9)},
        "model": model,
        "bytes": total,
        "largest_parameter_bytes": largest,
        "bound_mb": round(bound),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
