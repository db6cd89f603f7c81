"""The JSON file of a measurement (`rlad bench`), which `rlad plan --bench` reads."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlad_megatron import platform
from rlad_megatron.config.bench import CPU
from rlad_megatron.versions import installed

KEPT = (  # not losses
    *("time/", "perf/", "slowest/", "trainer/", "teacher/", "tokens/", "memory/", "sync/"),
    *("decode/", "prefill/"),
)


def rounds_of(lines: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The figures that are kept, each in all rounds. lines: one for each round, with the same names."""
    return {name: [line[name] for line in lines] for name in (lines[0] if lines else ()) if name.startswith(KEPT)}


def medians(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The medians of those figures."""
    return {name: statistics.median(values) for name, values in rounds_of(lines).items()}


def machine() -> dict[str, Any]:
    """What was measured on."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"device": platform.device_name() or CPU, "cores": os.cpu_count(), "python": python}


def write_result(path: Path, found: Mapping[str, Any]) -> None:
    """Write what was found, and the versions of the packages."""
    path.write_text(json.dumps({**found, "versions": installed()}, indent=2) + "\n")
