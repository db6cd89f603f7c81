"""What a step got done for its time: tokens per second, MFU, the slowest rank, memory by part. Metrics `perf/...`.

MFU is the share of a device's peak that the operations which a step needs make up (plan/cost.py:forward_flops): of
bf16 products on a known GPU (plan/devices.py), otherwise of products in the student's precision, measured at the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.placement import total_gpus
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.plan.cost import UPDATE_PASSES, forward_flops
from rlad_megatron.plan.devices import bf16_flops
from rlad_megatron.types import Sample

PRODUCT_SIZE = {"cpu": 512, "cuda": 4096}  # rows and columns of the matrices whose product is timed: milliseconds


class Performance:
    """Counts the work of a step until `pop`. Every rank counts the work of all ranks."""

    def __init__(self, config: RunConfig, student: ModelSpec, teacher: ModelSpec | None, rate: float) -> None:
        """rate: of a rank, in FLOP/s (`rank_rate`)."""
        self.rate = rate
        self._student, self._teacher = student, teacher
        self._trainer_rate = rate * config.train.world_size
        self._teacher_rate = rate * config.teacher_world_size
        self._devices = total_gpus(config) or config.train.world_size
        self._clear()

    def _clear(self) -> None:
        self.tokens = 0  # of prompts and responses
        self._update_flops = self._teacher_flops = 0

    def trained(self, samples: Sequence[Sample]) -> None:
        """An update has, or will have, the gradients of these samples."""
        self.tokens += sum(sample.tokens.numel() for sample in samples)
        self._update_flops += UPDATE_PASSES * _forward(self._student, samples)

    def scored(self, samples: Sequence[Sample]) -> None:
        """The teacher has scored these samples."""
        if self._teacher is not None:
            self._teacher_flops += _forward(self._teacher, samples)

    def pop(self, times: Mapping[str, float], teacher_s: float | None = None) -> dict[str, float]:
        """Metrics since the last pop. times: seconds, `time/...` of the step. teacher_s: that the teacher computed."""
        found: dict[str, float] = {}
        if step := times.get("time/step"):
            found["perf/tokens_per_s"] = self.tokens / step
            found["perf/tokens_per_gpu_s"] = self.tokens / step / self._devices
        if (update := times.get("time/update")) and self._update_flops:
            found["perf/mfu"] = self._update_flops / update / self._trainer_rate
        if teacher_s and self._teacher_flops:
            found["perf/mfu_teacher"] = self._teacher_flops / teacher_s / self._teacher_rate
        self._clear()
        return found


def _forward(spec: ModelSpec, samples: Sequence[Sample]) -> int:
    lengths = [sample.tokens.numel() for sample in samples]
    return forward_flops(spec, lengths, sum(sample.response_length for sample in samples))


def rank_rate(precision: str) -> float:
    """The mean over ranks of the FLOP/s that a rank's device could reach. Collective over the world.

    precision: of the products that are measured where the device is unknown. The ranks measure at the same time, since
    those of CPUs share cores.
    """
    known = bf16_flops(platform.device_name())
    if known is None:
        known = platform.product_rate(platform.DTYPES[precision], PRODUCT_SIZE[platform.device().type])
    return sum(_of_all_ranks([known])[0]) / dist.get_world_size()


def slowest_ranks(seconds: Mapping[str, float]) -> dict[str, float]:
    """Metrics `slowest/<phase>`, a rank, and `slowest/<phase>_over_mean`. Collective over the world.

    seconds: that this rank itself has computed in each phase. Phases in which no rank did are left out.
    """
    found: dict[str, float] = {}
    if dist.get_world_size() == 1:
        return found
    for phase, of_ranks in zip(seconds, _of_all_ranks(seconds.values()), strict=True):
        if mean := sum(of_ranks) / len(of_ranks):
            slowest = max(range(len(of_ranks)), key=of_ranks.__getitem__)
            found[f"slowest/{phase}"] = slowest
            found[f"slowest/{phase}_over_mean"] = of_ranks[slowest] / mean
    return found


def _of_all_ranks(values: Iterable[float]) -> list[list[float]]:
    """For each value, those of all ranks."""
    own = torch.tensor(list(values), dtype=torch.float64)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows, dim=1).tolist()


def memory_metrics(parts: Mapping[str, int]) -> dict[str, float]:
    """Metrics `memory/...` of this rank, in GB of 1e9 bytes, between steps.

    parts: bytes of what is always held. On CUDA also `memory/activations_gb`: the peak so far, above what is held now.
    """
    peak, held = platform.peak_memory_gb(), platform.held_memory_gb()
    found = {f"memory/{name}_gb": size / 1e9 for name, size in parts.items()}
    return found | {"memory/peak_gb": peak} | ({} if held is None else {"memory/activations_gb": peak - held})
