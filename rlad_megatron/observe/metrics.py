"""Metrics of a run: one JSON object per step in `metrics.jsonl`, TensorBoard, and W&B on request."""

from __future__ import annotations

import json
import math
import os
from contextlib import AbstractContextManager
from pathlib import Path

from rlad_megatron.errors import DataError

METRICS_FILE = "metrics.jsonl"


class MetricsWriter(AbstractContextManager):
    """Writes the metrics of each step. One writer per run, on rank 0.

    Args:
        run_dir: the run folder, created if missing. An existing metrics file is appended to, after removing the
            half-written last line of an interrupted run.
        tensorboard: also write event files under `run_dir/tensorboard`.
        wandb_project: also log to this W&B project, under the name of the run folder; empty for none.
    """

    def __init__(self, run_dir: Path | str, tensorboard: bool, wandb_project: str = "") -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._path = self.run_dir / METRICS_FILE
        _remove_partial_line(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard_wanted = tensorboard
        self._tensorboard = None  # opened at the first write, when the step to purge from is known
        self._purge_step: int | None = None
        self._wandb = None
        if wandb_project:
            import wandb  # optional, and it uses the network

            self._wandb = wandb.init(
                project=wandb_project, name=self.run_dir.name, id=self.run_dir.name, dir=self.run_dir, resume="allow"
            )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one step. Values are numbers or one-element tensors.

        JSON has no NaN or infinity: they are written as null, which `read_metrics` reads as NaN.
        """
        numbers = {key: _number(value) for key, value in metrics.items()}
        line = {"step": step} | {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard_wanted and self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self._purge_step)
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def truncate_after(self, step: int) -> None:
        """On resume, before the first write: drop the steps after `step`, so that no step appears twice.

        Replaces metrics.jsonl atomically and makes TensorBoard hide later events. W&B ignores steps that it already
        has.
        """
        kept = [line for line in _lines(self._path) if line["step"] <= step]
        self._file.close()
        temporary = self._path.with_suffix(".jsonl.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._purge_step = step + 1

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_metrics(run_dir: Path | str) -> list[dict[str, float]]:
    """All steps of a run in file order, null as NaN. Another process may be writing.

    Ignores a half-written last line. A missing file gives an empty list.

    Raises:
        DataError: another line is not a JSON object with a "step".
    """
    lines = _lines(Path(run_dir) / METRICS_FILE)
    return [{key: math.nan if value is None else value for key, value in line.items()} for line in lines]


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    raw_lines = path.read_bytes().split(b"\n")[:-1]  # the rest is empty or half-written
    lines = []
    for number, raw in enumerate(raw_lines, start=1):
        try:
            line = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}); remove the line") from error
        if not isinstance(line, dict) or "step" not in line:
            raise DataError(f'{path}, line {number} is not an object with a "step"; remove the line')
        lines.append(line)
    return lines


def _remove_partial_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end != len(content):
            os.truncate(path, end)


def _number(value: float) -> float:
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)
