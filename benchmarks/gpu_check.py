"""Correctness and speed on one GPU.

Needs torch, Megatron-Core and pydantic; uses Transformer Engine and Triton if present.

    python benchmarks/gpu_check.py                  # under 8 minutes
    python benchmarks/gpu_check.py --size tiny      # the same code path on a CPU, in seconds; its times mean nothing

First compares the loss and gradient of a small model with float32. Then times TRRD steps (teacher, old log-probs,
update) on synthetic rollouts of 8 x 4096 tokens: a student of 1.1 B and a teacher of 3.0 B parameters, both random and
shaped like Qwen3, in bf16 and each FP8 recipe that the device supports, with the fused loss and with the logits of all
tokens. MFU counts the matrix products that a step needs (half of causal attention, the head where there is loss,
backward as twice forward) relative to the rate of large bf16 products on this device. Prints a line for each thing that
is missing, and skips it.

The most important results come first, and each result rewrites the JSON file, so a killed run leaves what it measured
("complete": false). Exit code 1: a check exceeds its bound, or something failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs from a checkout that is not installed

import gpu_steps
import measure
import torch
from gpu_steps import FUSED, MATERIALISING, Scorer, Student, Variant

from rlad_megatron import platform
from rlad_megatron.config import LossConfig
from rlad_megatron.kernels import softmax_kernels, softmax_torch
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.parallel.loss_memory import padded_vocab_size, pick_chunk_tokens
from rlad_megatron.trainer.loss import fused_linear_trrd

LOSSES = {"fused": FUSED, "all logits": MATERIALISING}


@dataclass(frozen=True)
class Size:
    student: dict[str, int]
    teacher: dict[str, int]
    samples: int
    prompt: int
    response: int
    microbatch_tokens: int  # initial budget; halved until it fits
    product: int  # rows and columns of the matrices whose product rate is measured
    head_tokens: int  # tokens of the separate measurement of the fused loss
    repeats: int


_QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936}
SIZES = {
    "full": Size(
        student=_QWEN3
        | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "num_attention_heads": 16},
        teacher=_QWEN3
        | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 26, "num_attention_heads": 32},
        samples=8,
        prompt=512,
        response=3584,
        microbatch_tokens=16384,
        product=8192,
        head_tokens=8192,
        repeats=3,
    ),
    "tiny": Size(
        student=gpu_steps.SMALL | {"num_hidden_layers": 1},
        teacher=gpu_steps.SMALL | {"num_hidden_layers": 2},
        samples=4,
        prompt=8,
        response=24,
        microbatch_tokens=64,
        product=256,
        head_tokens=64,
        repeats=1,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no measurement after this time (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON (default: benchmarks/results/gpu_check_<device>.json)")
    options = parser.parse_args()
    if options.size == "full" and not platform.has_cuda():
        sys.exit("gpu_check: no CUDA device; --size tiny runs the same code path on a CPU")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    machine = measure.machine()
    name = re.sub(r"\W+", "_", str(machine["device"])).strip("_").lower()
    output = options.output or Path(__file__).parent / "results" / f"gpu_check_{name}.json"
    about = {"machine": machine | {"cuda": torch.version.cuda}, "size": options.size}

    def save(found: dict[str, object]) -> None:
        partial = output.with_name(output.name + ".tmp")
        partial.write_text(json.dumps(about | found, indent=2) + "\n")
        os.replace(partial, output)

    check = Check(SIZES[options.size], gpu_steps.join(), time.monotonic() + 60 * options.minutes, save)
    check.run()
    gpu_steps.leave()
    print(f"wrote {output}")
    sys.exit(1 if check.found["failed"] else 0)


class Check:
    """The measurements in order, with a line for each thing that is missing or fails."""

    def __init__(
        self, size: Size, groups: ModelGroups, deadline: float, save: Callable[[dict[str, object]], None]
    ) -> None:
        """deadline: a time.monotonic() after which nothing starts. save: called with `found` whenever it grows."""
        self.size, self.groups, self.deadline, self.save = size, groups, deadline, save
        self.found: dict[str, object] = {"complete": False, "errors": [], "steps": [], "notes": [], "failed": []}
        self.samples = gpu_steps.synthetic_rollouts([(size.prompt, size.response)] * size.samples, self.vocab_size)

    @property
    def vocab_size(self) -> int:
        return self.size.student["vocab_size"]

    def run(self) -> None:
        """Correctness; steps in bf16 and the cost of the fused loss; FP8; last, the logits of all tokens."""
        variants, missing = gpu_steps.variants()
        for line in missing:
            self.note(line)
        if platform.has_cuda() and softmax_kernels(platform.device()) is softmax_torch:
            self.note("Triton: not installed; the fused loss uses torch's kernels")
        rate = product_rate(self.size.product)
        print(f"bf16 products of {self.size.product} x {self.size.product}: {rate / 1e12:.1f} TFLOP/s", flush=True)
        self.keep(product_tflops=rate / 1e12)
        self.errors(variants)
        print_table(self.found["errors"], "Small model against float32: relative errors")
        bf16, *others = variants
        self.measure(bf16, "fused", rate)
        head = self.attempt("fused loss", self.head_ratio)
        if head:
            print(f"fused loss: {head['ratio']:.2f} times its three matrix products", flush=True)
        self.keep(fused_loss=head)
        for variant, loss in [*((other, "fused") for other in others), *((each, "all logits") for each in variants)]:
            self.measure(variant, loss, rate)
        print_table(
            self.found["steps"], f"Steps on {self.size.samples} x {self.size.prompt + self.size.response} tokens"
        )
        self.keep(complete=True)

    def keep(self, **found: object) -> None:
        self.found |= found
        self.save(self.found)

    def add(self, table: str, row: dict[str, object]) -> None:
        """Keep a row, and print it as a line."""
        print(", ".join(f"{name} {_cell(value)}" for name, value in row.items()), flush=True)
        self.keep(**{table: [*self.found[table], row]})

    def note(self, line: str, *, failed: str = "") -> None:
        print(f"- {line}", flush=True)
        self.keep(notes=[*self.found["notes"], line], failed=[*self.found["failed"], *([failed] if failed else [])])

    def attempt(self, what: str, action: Callable[[], object]):
        """The result of `action`; None, with a line, if time is up or it fails."""
        if time.monotonic() > self.deadline:
            self.note(f"{what}: not run, time is up (--minutes)")
            return None
        try:
            return action()
        except Exception as error:  # kernels fail in many ways on unknown devices; the other results still matter
            self.note(f"{what}: failed: {gpu_steps.first_line(error)}", failed=what)
            return None

    def errors(self, variants: list[Variant]) -> None:
        """Errors of a small model's loss and gradient against float32, in every variant."""
        reference = self.attempt("float32 reference", lambda: gpu_steps.Reference(self.groups))
        for variant in [Variant("fp32", precision="fp32"), *variants] if reference else []:
            for name, loss in LOSSES.items():
                what = f"errors of {variant.name}, {name}"
                found = self.attempt(what, lambda variant=variant, loss=loss: reference.errors(variant, loss))
                if found is None:
                    continue
                over = [key for key, bound in gpu_steps.bounds(variant).items() if not found[key] <= bound]
                if over:
                    self.note(f"{what}: {' and '.join(over)} over the bound", failed=what)
                row = {"variant": variant.name, "loss from": name}
                self.add("errors", row | found | {"within bounds": "NO" if over else "yes"})

    def head_ratio(self) -> dict[str, float]:
        """Time of the fused loss over the time of its three matrix products, bf16."""
        device, tokens, hidden = platform.device(), self.size.head_tokens, self.size.student["hidden_size"]
        hidden_TH = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        rows = padded_vocab_size(self.vocab_size, 1)
        weight_VH = (torch.randn(rows, hidden, device=device) * hidden**-0.5).bfloat16().requires_grad_()
        target_T = torch.randint(0, self.vocab_size, (tokens,), device=device)
        zeros_T, ones_T = torch.zeros(tokens, device=device), torch.ones(tokens, device=device)
        logits_TV = torch.empty(tokens, rows, device=device, dtype=torch.bfloat16)
        chunk = pick_chunk_tokens(FUSED.memory_mb, rows, 2)

        def products() -> None:
            with torch.no_grad():
                torch.mm(hidden_TH, weight_VH.t(), out=logits_TV)
                logits_TV @ weight_VH
                logits_TV.t() @ hidden_TH

        def clear() -> None:
            hidden_TH.grad = weight_VH.grad = None

        def fused() -> None:
            per_token = (target_T, zeros_T, zeros_T, ones_T, ones_T / tokens)
            sizes = {"vocab_size": self.vocab_size, "chunk_tokens": chunk}
            fused_linear_trrd(hidden_TH, weight_VH, *per_token, **sizes)[0].backward()

        actions = {"products": products, "fused": fused}
        seconds = measure.paired_seconds(actions, max(3, self.size.repeats), before=clear)
        medians = {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}
        return medians | {"ratio": measure.median_ratio(seconds["fused"], seconds["products"])}

    def measure(self, variant: Variant, loss: str, rate: float) -> None:
        found = self.attempt(f"{variant.name}, {loss}", lambda: self.fitting_steps(variant, LOSSES[loss]))
        if found:
            self.add("steps", self.row(variant, loss, found, rate))

    def fitting_steps(self, variant: Variant, loss: LossConfig) -> dict[str, float]:
        """`steps` with the largest micro-batches that fit, and their budget in tokens."""
        budget = self.size.microbatch_tokens
        while True:
            try:
                return {"tokens": budget, **self.steps(variant, loss, budget)}
            except torch.OutOfMemoryError:
                self.note(f"{variant.name}: out of memory with micro-batches of {budget} tokens, fused={loss.fused}")
                if budget // 2 < self.size.prompt + self.size.response:
                    raise
                budget //= 2

    def steps(self, variant: Variant, loss: LossConfig, budget: int) -> dict[str, float]:
        """Median seconds of each phase after one warm-up step; memory in GB (1e9 bytes)."""
        release()
        before = allocated()
        teacher = Scorer(gpu_steps.qwen3_like(**self.size.teacher), variant.teacher, self.groups)
        teacher_gb = (allocated() - before) / 1e9
        student = Student(gpu_steps.qwen3_like(**self.size.student), variant.student, self.groups)
        phases = {
            "teacher": lambda: teacher.log_probs(self.samples, budget_tokens=budget, loss=loss),
            "old": lambda: student.log_probs(self.samples, budget_tokens=budget, loss=loss),
            "update": lambda: student.update(self.samples, budget_tokens=budget, loss=loss),
        }
        seconds: dict[str, list[float]] = {phase: [] for phase in phases}
        for repeat in range(-1, self.size.repeats):
            for phase, action in phases.items():
                platform.synchronize()
                begin = time.perf_counter()
                action()
                platform.synchronize()
                if repeat >= 0:
                    seconds[phase].append(time.perf_counter() - begin)
        medians = {phase: statistics.median(times) for phase, times in seconds.items()}
        return medians | {"teacher_gb": teacher_gb, "peak_gb": platform.peak_memory_gb()}

    def row(self, variant: Variant, loss: str, found: dict[str, float], rate: float) -> dict[str, object]:
        lengths = [self.size.prompt + self.size.response] * self.size.samples
        positions = self.size.response * self.size.samples
        of_student = forward_flops(gpu_steps.qwen3_like(**self.size.student), lengths, positions)
        flops = {
            "teacher": forward_flops(gpu_steps.qwen3_like(**self.size.teacher), lengths, positions),
            "old": of_student,
            "update": 3 * of_student,
        }
        step = sum(found[phase] for phase in flops)
        row: dict[str, object] = {"variant": variant.name, "loss from": loss, "tokens": found["tokens"]}
        for phase, count in flops.items():
            row |= {f"{phase} s": found[phase], f"{phase} MFU": count / found[phase] / rate}
        row |= {"step s": step, "tokens/s": sum(lengths) / step}
        return row | {"teacher GB": found["teacher_gb"], "peak GB": found["peak_gb"]}


def forward_flops(spec: ModelSpec, lengths: list[int], positions: int) -> int:
    """FLOPs of the matrix products of one forward pass over sequences of these lengths, with loss at `positions`."""
    query, kv = spec.size("query"), spec.size("kv")
    matrices = spec.hidden_size * (2 * query + 2 * kv + 3 * spec.ffn_size)
    attention = sum(2 * length * length * query for length in lengths)  # two products, half of each masked
    layers = spec.num_layers * (2 * sum(lengths) * matrices + attention)
    return layers + 2 * positions * spec.hidden_size * spec.vocab_size


def product_rate(size: int) -> float:
    """FLOP/s of bf16 products of two square matrices, the best of several runs."""
    left, right = (torch.randn(size, size, device=platform.device(), dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    best = float("inf")
    for _ in range(5):
        platform.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            torch.mm(left, right, out=out)
        platform.synchronize()
        best = min(best, (time.perf_counter() - begin) / 10)
    return 2 * size**3 / best


def allocated() -> int:
    return torch.cuda.memory_allocated() if platform.has_cuda() else 0


def release() -> None:
    """Free the memory of deleted models, and reset the device's peak."""
    gc.collect()
    platform.empty_cache()
    if platform.has_cuda():
        torch.cuda.reset_peak_memory_stats()


def print_table(rows: list[dict[str, object]], title: str) -> None:
    if not rows:
        return
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
