"""The parts of gpu_check.py that build models. Imports only torch, Megatron-Core and this repository."""

from __future__ import annotations

import functools
import gc
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gpu_steps
import measure
import torch
import torch.distributed as dist
from gpu_steps import FUSED, MATERIALISING, Reference, Scorer, Student, Variant

from rlad_megatron import platform
from rlad_megatron.config import LayoutConfig, LossConfig
from rlad_megatron.kernels import softmax_kernels, softmax_torch
from rlad_megatron.models.build import named_parameters
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.models.shard_plan import build_shard_plan
from rlad_megatron.parallel.loss_memory import padded_vocab_size
from rlad_megatron.plan.cost import UPDATE_PASSES, forward_flops
from rlad_megatron.platform.broadcast import open_broadcast_group
from rlad_megatron.servers.transfer.buckets import Assembly, Cargo, bucket_size
from rlad_megatron.trainer.loss import fused_linear_trrd

if TYPE_CHECKING:
    from gpu_check import Record

LOSSES = {"fused": FUSED, "all logits": MATERIALISING}
CHUNK_BUDGETS_MB = (512, 1024, 2048, 4096)


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
    bucket_bytes: int
    repeats: int

    @property
    def vocab_size(self) -> int:
        return self.student["vocab_size"]


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
        bucket_bytes=256 * 10**6,
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
        bucket_bytes=10**6,
        repeats=1,
    ),
}


def measure_part(name: str, record: Record, size: str) -> None:
    """Run the part of this name, and put what it finds on the record."""
    parts = _parts(size)
    getattr(parts, name.replace(" ", "_"))(record)


@functools.cache
def _parts(size: str) -> Parts:
    return Parts(SIZES[size])


class Parts:
    """The parts, as methods of their names. Each takes the record, and frees what it has built."""

    def __init__(self, size: Size) -> None:
        logging.getLogger("megatron").setLevel(logging.ERROR)
        self.size, self.groups = size, gpu_steps.join()
        (self.bf16, *self.others), self.missing = gpu_steps.variants()

    @functools.cached_property
    def reference(self) -> Reference:
        return Reference(self.groups)

    @functools.cached_property
    def rate(self) -> float:
        return platform.product_rate(torch.bfloat16, self.size.product)

    def small_model(self, record: Record) -> None:
        for line in self.missing:
            record.note(line)
        if platform.has_cuda() and softmax_kernels(platform.device()) is softmax_torch:
            record.note("Triton: not installed; the fused loss uses torch's kernels")
        for variant in (Variant("fp32", precision="fp32"), self.bf16):
            self._errors(record, variant)

    def steps(self, record: Record) -> None:
        record.keep(product_tflops=self.rate / 1e12)
        print(f"bf16 products of {self.size.product} x {self.size.product}: {self.rate / 1e12:.1f} TFLOP/s", flush=True)
        self._steps(record, self.bf16, "fused")

    def fp8(self, record: Record) -> None:
        for variant in self.others:
            attempt(record, f"errors of {variant.name}", lambda variant=variant: self._errors(record, variant))
        for variant in self.others:
            attempt(record, f"steps in {variant.name}", lambda variant=variant: self._steps(record, variant, "fused"))

    def all_logits(self, record: Record) -> None:
        for variant in (self.bf16, *self.others):
            what = f"steps in {variant.name}, all logits"
            attempt(record, what, lambda variant=variant: self._steps(record, variant, "all logits"))

    def loss(self, record: Record) -> None:
        """Time of the fused loss over the time of its three matrix products in bf16, for several chunk budgets."""
        device, tokens, hidden = platform.device(), self.size.head_tokens, self.size.student["hidden_size"]
        hidden_TH = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        rows = padded_vocab_size(self.size.vocab_size, 1)
        weight_VH = (torch.randn(rows, hidden, device=device) * hidden**-0.5).bfloat16().requires_grad_()
        target_T = torch.randint(0, self.size.vocab_size, (tokens,), device=device)
        zeros_T, ones_T = torch.zeros(tokens, device=device), torch.ones(tokens, device=device)
        logits_TV = torch.empty(tokens, rows, device=device, dtype=torch.bfloat16)

        def products() -> None:
            with torch.no_grad():
                torch.mm(hidden_TH, weight_VH.t(), out=logits_TV)
                logits_TV @ weight_VH
                logits_TV.t() @ hidden_TH

        def clear() -> None:
            hidden_TH.grad = weight_VH.grad = None

        def fused(chunk: int) -> None:
            per_token = (target_T, zeros_T, zeros_T, ones_T, ones_T / tokens)
            sizes = {"vocab_size": self.size.vocab_size, "chunk_tokens": chunk}
            fused_linear_trrd(hidden_TH, weight_VH, *per_token, **sizes)[0].backward()

        # Without the bound of `pick_chunk_tokens`, so that the largest shows what it costs.
        chunks = {budget: budget * 10**6 // (rows * 2) for budget in CHUNK_BUDGETS_MB}
        actions: dict[str, Callable[[], None]] = {"products": products}
        actions |= {f"{budget}": functools.partial(fused, chunk) for budget, chunk in chunks.items()}
        seconds = measure.paired_seconds(actions, max(3, self.size.repeats), before=clear)
        for budget, chunk in chunks.items():
            record.add(
                "loss",
                {
                    "chunk budget MB": budget,
                    "chunk tokens": min(chunk, tokens),
                    "products s": statistics.median(seconds["products"]),
                    "fused s": statistics.median(seconds[f"{budget}"]),
                    "fused / products": measure.median_ratio(seconds[f"{budget}"], seconds["products"]),
                },
            )

    def transport(self, record: Record) -> None:
        """Pack the student's weights in buckets, send them in a group of one, and put them together again."""
        release()
        spec = gpu_steps.qwen3_like(**self.size.student)
        parameters = named_parameters(Scorer(spec, self.bf16.teacher, self.groups).chunks, spec)
        plan = build_shard_plan(spec, LayoutConfig())
        entries = plan.entries(self.groups.place)
        weights = GatheredWeights(entries, parameters, plan.hf_shapes, dtype=torch.bfloat16)
        expected, owned, tensors = dict(weights), weights.owned(), weights.metadata()
        cargo = Cargo(tensors, [(slice_.tensor, slice_.box) for slice_ in owned])
        group = open_broadcast_group(dist.HashStore(), 0, 1, "127.0.0.1", 30.0)
        assembly, arrived, sent, seconds = Assembly(tensors, platform.device()), 0, 0, 0.0
        for bucket in cargo.buckets(self.size.bucket_bytes):
            buffer = torch.empty(bucket_size(bucket), dtype=torch.uint8, device=platform.device())
            for part in bucket:
                slice_ = owned[part.slice]
                first, (start, stop) = slice_.box[0][0], part.box[0]
                values = slice_.parameter[slice_.local.slices][start - first : stop - first]
                part.view(buffer, torch.bfloat16).copy_(values)
            platform.synchronize()
            begin = time.perf_counter()
            group.transfer(buffer)()
            platform.synchronize()
            seconds += time.perf_counter() - begin
            sent += buffer.numel()
            for part in bucket:
                tensor, _ = cargo.slices[part.slice]
                if whole := assembly.add(tensor, part.box, part.view(buffer, torch.bfloat16)):
                    name, values = whole
                    if not torch.equal(values, expected[name]):
                        raise AssertionError(f"{name} did not arrive as it was sent")
                    arrived += 1
        group.close()
        if arrived != len(tensors):
            raise AssertionError(f"{arrived} of {len(tensors)} tensors arrived")
        record.keep(transport={"backend": type(group).__name__, "bytes": sent, "seconds": seconds})
        print(f"{type(group).__name__}: {arrived} tensors, {sent / 1e9:.3f} GB in {seconds:.3f} s", flush=True)

    def _errors(self, record: Record, variant: Variant) -> None:
        """Errors of a small model's loss and gradient against float32, from both losses."""
        for name, loss in LOSSES.items():
            found = self.reference.errors(variant, loss)
            over = [key for key, bound in gpu_steps.bounds(variant).items() if not found[key] <= bound]
            if over:
                record.note(f"errors of {variant.name}, {name}: {' and '.join(over)} over the bound", failed=True)
            row = {"variant": variant.name, "loss from": name}
            record.add("errors", row | found | {"within bounds": "NO" if over else "yes"})

    def _steps(self, record: Record, variant: Variant, loss: str) -> None:
        """Steps with the largest micro-batches that fit."""
        budget = self.size.microbatch_tokens
        while True:
            try:
                found = self._timed_steps(variant, LOSSES[loss], budget)
            except torch.OutOfMemoryError:
                record.note(f"{variant.name}, {loss}: out of memory with micro-batches of {budget} tokens")
                if budget // 2 < self.size.prompt + self.size.response:
                    raise
                budget //= 2
            else:
                return record.add("steps", self._row(variant, loss, budget, found))

    def _timed_steps(self, variant: Variant, loss: LossConfig, budget: int) -> dict[str, float]:
        """Median seconds of each phase after one warm-up step; memory in GB (1e9 bytes)."""
        release()
        size = self.size
        samples = gpu_steps.synthetic_rollouts([(size.prompt, size.response)] * size.samples, size.vocab_size)
        before = allocated()
        teacher = Scorer(gpu_steps.qwen3_like(**size.teacher), variant.teacher, self.groups)
        teacher_gb = (allocated() - before) / 1e9
        student = Student(gpu_steps.qwen3_like(**size.student), variant.student, self.groups)
        phases = {
            "teacher": lambda: teacher.log_probs(samples, budget_tokens=budget, loss=loss),
            "old": lambda: student.log_probs(samples, budget_tokens=budget, loss=loss),
            "update": lambda: student.update(samples, budget_tokens=budget, loss=loss),
        }
        seconds: dict[str, list[float]] = {phase: [] for phase in phases}
        for repeat in range(-1, size.repeats):
            for phase, action in phases.items():
                platform.synchronize()
                begin = time.perf_counter()
                action()
                platform.synchronize()
                if repeat >= 0:
                    seconds[phase].append(time.perf_counter() - begin)
        medians = {phase: statistics.median(times) for phase, times in seconds.items()}
        return medians | {"teacher_gb": teacher_gb, "peak_gb": platform.peak_memory_gb()}

    def _row(self, variant: Variant, loss: str, budget: int, found: dict[str, float]) -> dict[str, object]:
        lengths = [self.size.prompt + self.size.response] * self.size.samples
        positions = self.size.response * self.size.samples
        of_student = forward_flops(gpu_steps.qwen3_like(**self.size.student), lengths, positions)
        flops = {
            "teacher": forward_flops(gpu_steps.qwen3_like(**self.size.teacher), lengths, positions),
            "old": of_student,
            "update": UPDATE_PASSES * of_student,
        }
        step = sum(found[phase] for phase in flops)
        row: dict[str, object] = {"variant": variant.name, "loss from": loss, "tokens": budget}
        for phase, count in flops.items():
            row |= {f"{phase} s": found[phase], f"{phase} MFU": count / found[phase] / self.rate}
        row |= {"step s": step, "tokens/s": sum(lengths) / step}
        return row | {"teacher GB": found["teacher_gb"], "peak GB": found["peak_gb"]}


def attempt(record: Record, what: str, action: Callable[[], object]) -> None:
    """Do one of several things of a part; if it fails, the others still matter."""
    try:
        action()
    except Exception as error:
        record.note(f"{what}: failed: {measure.first_line(error)}", failed=True)


def allocated() -> int:
    return torch.cuda.memory_allocated() if platform.has_cuda() else 0


def release() -> None:
    """Free the memory of deleted models, and reset the device's peak."""
    gc.collect()
    platform.empty_cache()
    if platform.has_cuda():
        torch.cuda.reset_peak_memory_stats()
