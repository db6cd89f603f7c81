"""What only a GPU can prove, on one GPU, the most valuable first.

Needs torch; parts also need Megatron-Core, pydantic or pytest, and use Triton, Transformer Engine and vLLM if present.
tools/gpu_kit.sh brings what is missing, and runs this.

    python benchmarks/gpu_check.py                  # under 8 minutes
    python benchmarks/gpu_check.py --size tiny      # the same code path on a CPU; its times mean nothing

The parts, in order:

    kernels       the fused loss and its kernels against float64 (tests/gpu/test_loss.py)
    small model   loss and gradient of a small model in bf16 against float32
    steps         TRRD steps (teacher, old log-probs, update) on 8 x 4096 tokens: a student of 1.1 B and a teacher of
                  3.0 B parameters, random and shaped like Qwen3, in bf16 with the fused loss; MFU
    loss          the fused loss against its three matrix products, for several chunk budgets
    transport     buckets of the student's weights through NCCL. One GPU cannot be two ranks, so the group is of one
    server        a whole run with a vLLM server on the same GPU (tests/gpu/test_run.py)
    fp8           loss, gradient and steps in each FP8 recipe that the device supports
    all logits    steps with the logits of all tokens in place of the fused loss
    tests         the other tests of tests/gpu

MFU counts the matrix products that a step needs (half of causal attention, the head where there is loss, backward as
twice forward) relative to the rate of large bf16 products on this device. What is missing costs a line.

Each result rewrites the JSON file. Run again, and it goes on where it was cut off: it repeats a part in which the
process ended, after the others, once. A part over its time limit ends the process with a traceback (SIGALRM);
tools/gpu_kit.sh starts the next one. Delete the file to start over.

Exit code 1: a check exceeds its bound, or something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import measure
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs from a checkout that is not installed

CUDA = "13.0"  # that requirements/gpu.txt is for
# part -> seconds after which it is ended
LIMITS = {
    "kernels": 90,
    "small model": 90,
    "steps": 150,
    "loss": 60,
    "transport": 40,
    "server": 240,
    "fp8": 200,
    "all logits": 90,
    "tests": 240,
}
ALLOCATOR = "PYTORCH_ALLOC_CONF"
LEAST_S = 5  # with less time left nothing is begun
TITLES = {
    "errors": "Small model against float32: relative errors",
    "steps": "Steps",
    "loss": "Fused loss against its three matrix products",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (%(default)s)")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds of them that have passed (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON (default: benchmarks/results/gpu_check_<device>.json)")
    options = parser.parse_args()
    os.environ.setdefault(ALLOCATOR, "expandable_segments:True")  # as ranks have it; CUDA reads it when it starts
    if options.size == "full" and not torch.cuda.is_available():
        sys.exit("gpu_check: no CUDA device; --size tiny runs the same code path on a CPU")
    machine = measure.machine() | {"cuda": torch.version.cuda}
    name = re.sub(r"\W+", "_", str(machine["device"])).strip("_").lower()
    output = options.output or ROOT / "benchmarks" / "results" / f"gpu_check_{name}.json"
    record = Record(output, {"machine": machine, "commit": commit(), "size": options.size})
    deadline = time.monotonic() + 60 * options.minutes - options.spent
    if machine["cuda"] not in (None, CUDA):
        print(f"- torch is for CUDA {machine['cuda']}; Transformer Engine and vLLM here are for {CUDA}", flush=True)
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)  # the traceback of a part that hangs, before the signal ends it
    actions = make_actions(record, options.size)
    for part in record.pending():
        run_part(record, part, actions[part], deadline)
    record.finish()
    print_tables(record)
    print(f"wrote {output}")
    sys.exit(1 if record.failed else 0)


class Record:
    """What was found, by part, in a JSON file that is rewritten whenever it grows."""

    def __init__(self, output: Path, about: dict[str, object]) -> None:
        """Goes on with the file of an earlier process that did not finish, if that had the same `about`."""
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, object] = {**about, "complete": False, "parts": {}}
        if output.exists():
            earlier = json.loads(output.read_text())
            if not earlier["complete"] and earlier.items() >= about.items():
                self.found = earlier
        self.part: dict[str, object] = {}  # the present one

    @property
    def parts(self) -> dict[str, dict[str, object]]:
        return self.found["parts"]

    @property
    def failed(self) -> list[str]:
        return [line for part in self.parts.values() for line in part["failed"]]

    def pending(self) -> list[str]:
        """The parts that have not ended: those never begun, then those in which one process has ended."""
        for name, part in self.parts.items():
            if not part["ended"] and part["tries"] == 2:
                self.part = part
                self.note(f"{name}: the process ended twice, at the time limit or in a crash", failed=True)
                part["ended"] = True
        left = [name for name in LIMITS if not self.parts.get(name, {}).get("ended")]
        return sorted(left, key=lambda name: name in self.parts)

    def begin(self, name: str) -> None:
        tries = self.parts.get(name, {}).get("tries", 0) + 1
        self.part = self.parts[name] = {"ended": False, "tries": tries, "notes": [], "failed": []}
        self.save()

    def finish(self) -> None:
        self.found["complete"] = not self.pending()
        self.save()

    def keep(self, **found: object) -> None:
        """Keep results of the present part."""
        self.part |= found
        self.save()

    def add(self, table: str, row: dict[str, object]) -> None:
        """Keep a row of the present part, and print it as a line."""
        print(", ".join(f"{name} {_cell(value)}" for name, value in row.items()), flush=True)
        self.keep(**{table: [*self.part.get(table, []), row]})

    def note(self, line: str, *, failed: bool = False) -> None:
        print(f"- {line}", flush=True)
        self.part["failed" if failed else "notes"].append(line)
        self.save()

    def save(self) -> None:
        partial = self.output.with_name(self.output.name + ".tmp")
        partial.write_text(json.dumps(self.found, indent=2) + "\n")
        os.replace(partial, self.output)


def run_part(record: Record, name: str, action: Callable[[float], None], deadline: float) -> None:
    """Run one part, unless time is up. action: takes the seconds that it may last."""
    seconds = math.floor(min(LIMITS[name], deadline - time.monotonic()))
    if seconds < LEAST_S:
        print(f"- {name}: not run, time is up (--minutes)", flush=True)
        return
    print(f"{name}:", flush=True)
    record.begin(name)
    begin = time.monotonic()
    signal.alarm(seconds)
    try:
        action(seconds)
    except Exception as error:  # kernels fail in many ways on unknown devices; the other results still matter
        record.note(f"{name}: failed: {measure.first_line(error)}", failed=True)
    finally:
        signal.alarm(0)
    record.keep(ended=True, seconds=time.monotonic() - begin)
    if record.part["failed"] and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # after some errors nothing works any more on the device in this process
            os.abort()


def make_actions(record: Record, size: str) -> dict[str, Callable[[float], None]]:
    """What each part does."""

    def measured(name: str) -> Callable[[float], None]:
        def action(_: float) -> None:
            import gpu_parts  # needs Megatron-Core

            gpu_parts.measure_part(name, record, size)

        return action

    loss, run = "tests/gpu/test_loss.py", "tests/gpu/test_run.py"

    def server(seconds: float) -> None:
        if missing := "CUDA device" if not torch.cuda.is_available() else "vLLM" if not find_spec("vllm") else "":
            record.note(f"server: no {missing}")
        else:
            run_tests(record, seconds, run, "-m", "gpu")

    tests = {
        "kernels": lambda seconds: run_tests(record, seconds, loss),
        "server": server,
        "tests": lambda seconds: run_tests(record, seconds, "tests/gpu", "--ignore", loss, "--ignore", run),
    }
    return {part: tests.get(part) or measured(part) for part in LIMITS}


def run_tests(record: Record, seconds: float, *arguments: str) -> None:
    """Run tests in a process of their own, which may ruin its device context, and end all that they have started."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *arguments]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # whatever else is installed there
    environment.pop(ALLOCATOR, None)  # a run with servers on the same GPU refuses it
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds - 2)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"pytest {' '.join(arguments)} took over {seconds - 2:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    summary = output.strip().splitlines()[-1]
    record.keep(tests=summary.strip("= "))
    print(summary, flush=True)
    if process.returncode:
        print(output, flush=True)
        lines = re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE)
        for line in lines or [f"pytest ended with {process.returncode}: {summary}"]:
            record.note(line, failed=True)


def commit() -> str:
    """Of the checkout; empty if there is none, or no git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def print_tables(record: Record) -> None:
    for table, title in TITLES.items():
        rows = [row for part in record.parts.values() for row in part.get(table, [])]
        if rows:
            print_table(rows, title)
    for line in record.failed:
        print(f"FAILED {line}", flush=True)


def print_table(rows: list[dict[str, object]], title: str) -> None:
    cells = [[_cell(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
    print(flush=True)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


if __name__ == "__main__":
    main()
