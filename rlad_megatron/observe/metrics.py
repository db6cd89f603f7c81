"""Metrics of a run: one JSON object per step in `metrics.jsonl`, TensorBoard, and W&B on request."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlad_megatron.errors import DataError

METRICS_FILE = "metrics.jsonl"


class MetricsWriter(ExitStack):
    """Writes the metrics of each step. One writer per run, on rank 0.

    Args:
        run_dir: the run folder, created if missing. An existing metrics file is appended to; a resumed run calls
            `truncate_after` first.
        tensorboard: also write event files under `run_dir/tensorboard`.
        wandb_project: also log to this W&B project, under the name of the run folder; empty for none.
    """

    def __init__(self, run_dir: Path | str, tensorboard: bool, wandb_project: str = "") -> None:
        super().__init__()
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._path = self.run_dir / METRICS_FILE
        self._tensorboard_wanted = tensorboard
        self._tensorboard: Any = None  # opened at the first write, when the step to purge from is known
        self._wandb = None
        if wandb_project:
            import wandb  # optional, and it uses the network

            self._wandb = wandb.init(
                project=wandb_project, name=self.run_dir.name, id=self.run_dir.name, dir=self.run_dir, resume="allow"
            )
            self.callback(self._wandb.finish)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one step. JSON has no NaN or infinity: they are written as null, which `read_metrics` reads as NaN."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_json_line({"step": step, **metrics}))
        if self._tensorboard_wanted and self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # TensorBoard hides this step and later ones of the run that is resumed.
            self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step)
            self.callback(self._tensorboard.close)
        if self._tensorboard is not None:
            for key, value in metrics.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def truncate_after(self, step: int) -> None:
        """On resume, before the first write: drop the steps after `step`, so that no step appears twice.

        Replaces metrics.jsonl atomically, without the half-written last line of an interrupted run. TensorBoard hides
        its later events at the first write, and W&B ignores steps that it already has.
        """
        temporary = self._path.with_suffix(".jsonl.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_json_line(line) for line in read_metrics(self.run_dir) if line["step"] <= step)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)


def read_metrics(run_dir: Path | str) -> list[dict[str, float]]:
    """All steps of a run in file order, null as NaN. Another process may be writing.

    Ignores a half-written last line. A missing file gives an empty list.

    Raises:
        DataError: another line is not a JSON object of numbers with a "step".
    """
    path = Path(run_dir) / METRICS_FILE
    return parse_metrics(path, path.read_bytes().split(b"\n")[:-1] if path.exists() else [])  # not a half-written line


def parse_metrics(path: Path, lines: list[bytes], before: int = 0) -> list[dict[str, float]]:
    """Whole lines of `metrics.jsonl`, as `read_metrics`. before: how many lines of the file precede them."""
    steps = []
    for number, raw in enumerate(lines, start=before + 1):
        try:
            line = json.loads(raw)
            values = {key: math.nan if value is None else value + 0 for key, value in line.items()}
            steps.append({"step": line["step"]} | values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = f'is not JSON of numbers with a "step" ({error!r})'
            raise DataError(f"{path}, line {number} {why}; remove the line") from error
    return steps


def _json_line(line: dict[str, float]) -> str:
    return json.dumps({key: value if math.isfinite(value) else None for key, value in line.items()}) + "\n"
