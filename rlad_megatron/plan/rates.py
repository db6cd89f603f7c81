"""What devices reach in a run: data sheets times assumed efficiencies, or what `rlad bench` measured. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlad_megatron.config import RunConfig
from rlad_megatron.config.bench import CPU, DECODE, PREFILL, REQUEST
from rlad_megatron.errors import ConfigError
from rlad_megatron.plan.devices import DEVICES, Device, assumed_name, find_device

# Shares of a data sheet's peak. Megatron-LM's README gives MFUs of 41 to 48 % on H100s for pretraining with fixed
# lengths; the others are assumed, and none was measured here.
TRAIN_MFU = 0.4  # of an update's and a teacher's pass
PREFILL_MFU = 0.5  # of reading prompts
MEMORY = 0.7  # of decoding: weights and KV cache are read once a step
LINKS = 0.8  # of NVLink and network, for long messages

# Assumed seconds and bytes/s.
DECODE_STEP_S = 0.003  # of each decode step, for scheduling, sampling and small kernels
ALL_REDUCE_S = 20e-6  # of one step's activations over a server's GPUs; two in a layer
PUSH_S = 0.2  # of each push, besides its bytes: pause, fingerprints, cache, resume, decoding the probe. As in the demo
HOST_COPY = 5e9  # bytes/s through a file in host memory
DISK = 1e9  # bytes/s of a trainer's node into a checkpoint


@dataclass(frozen=True)
class Measured:
    """Figures of `rlad bench`. None: not measured."""

    update_flops: float | None = None  # FLOP/s that a rank made of the operations that an update needs
    teacher_flops: float | None = None
    push_s: float | None = None  # of the student's weights, through shared memory
    push_bytes: float | None = None
    decode_s: tuple[tuple[int, float], ...] = ()  # (responses at the same time, seconds of a decode step), ascending
    prefill_s: float | None = None  # of a token of a prompt, which its group's requests share
    request_s: float | None = None  # of a prompt besides its tokens, where none comes with it

    def step_s(self, slots: int) -> tuple[float, ...]:
        """Seconds of a decode step of 1, 2, ... `slots` responses: on lines between and beyond the measured points."""
        return tuple(self._decode_s(number) for number in range(1, slots + 1))

    def _decode_s(self, responses: int) -> float:
        points = self.decode_s
        if len(points) == 1:
            return points[0][1]
        last = next((i for i, (number, _) in enumerate(points) if number >= responses), len(points) - 1)
        (few, before), (many, after) = points[max(last, 1) - 1], points[max(last, 1)]
        line = before + (after - before) * (responses - few) / (many - few)
        # Noise may let a line fall towards few responses; a step of fewer is not slower, and takes some time.
        return max(line, points[0][1] * min(1.0, responses / points[0][0]))


@dataclass(frozen=True)
class Rates:
    """What a plan counts time with."""

    device: Device | None  # None: CPUs, of which only measured figures are used
    measured: Measured
    source: str  # in words


def rates_for(config: RunConfig, files: Sequence[Path]) -> Rates:
    """The rates of a run's devices. files: of `rlad bench`; what a later one has measured takes precedence.

    Raises:
        ConfigError: a file is not one of `rlad bench`, or too little was measured on CPUs.
    """
    measured, names = Measured(), []
    for file in files:
        found = _read(file)
        names.append(found["machine"]["device"])
        if (names[-1] == CPU) == bool(config.train.gpus_per_node):
            raise ConfigError(
                f"--bench={file} was measured on {names[-1]}, but train.gpus_per_node={config.train.gpus_per_node}; "
                "measure on the devices of the run"
            )
        if names[-1] != names[0]:
            raise ConfigError(
                f"--bench={files[0]} was measured on {names[0]}, --bench={file} on {names[-1]}; give those of one"
            )
        figures = {name: value for name, value in vars(_measured(found, file)).items() if value not in (None, ())}
        measured = replace(measured, **figures)
    said = f"measured: {', '.join(map(str, files))}"
    if not config.train.gpus_per_node:
        _check_measured(config, measured)
        return Rates(None, measured, said)
    name = assumed_name(config.train.gpu_memory_gb)
    device = find_device(names[-1]) if names else None
    sheet = f"{names[-1] if device else name}'s data sheet"
    if device is None:
        sheet += f", assumed for train.gpu_memory_gb={config.train.gpu_memory_gb:g}"
    return Rates(device or DEVICES[name], measured, f"{said}; the rest: {sheet}" if files else sheet)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if {"perf/mfu", "perf/mfu_teacher"} & found["figures"].keys():
            float(found["machine"]["flops_per_rank"])
        if isinstance(found["machine"]["device"], str):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(f"--bench={file} is no file of `rlad bench`; make one with `rlad bench RECIPE --output {file}`")


def _measured(found: dict[str, Any], file: Path) -> Measured:
    figures, machine = found["figures"], found["machine"]
    rate = machine.get("flops_per_rank", math.nan)

    def reached(name: str) -> float | None:
        return figures[name] * rate if name in figures else None

    points = ((int(name.removeprefix(DECODE)), value) for name, value in figures.items() if name.startswith(DECODE))
    measured = Measured(
        reached("perf/mfu"),
        reached("perf/mfu_teacher"),
        figures.get("sync/seconds"),
        figures.get("sync/bytes"),
        tuple(sorted(points)),
        1 / figures[PREFILL] if PREFILL in figures else None,
        figures.get(REQUEST),
    )
    if measured == Measured():
        raise ConfigError(f"--bench={file} has no figures of a trainer, a teacher or servers; measure again")
    return measured


def _check_measured(config: RunConfig, measured: Measured) -> None:
    missing = {
        "the trainer (`rlad bench RECIPE`)": measured.update_flops is None,
        "the teacher (`rlad bench RECIPE`)": config.needs_teacher and measured.teacher_flops is None,
        "a server (`rlad bench RECIPE --servers-only`)": not measured.decode_s,
    }
    for what, is_missing in missing.items():
        if is_missing:
            raise ConfigError(
                f"train.gpus_per_node=0 is a run on CPUs, whose time needs measured figures: --bench lacks {what}; add "
                "--bench FILE with them"
            )
