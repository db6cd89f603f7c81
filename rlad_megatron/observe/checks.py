"""Checks that end a run which can no longer learn."""

from __future__ import annotations

from rlad_megatron.errors import TrainingError


class NonFiniteGuard:
    """Counts steps skipped for a non-finite loss or gradient, and stops the run after too many in a row.

    One such step is survivable: parameters are left alone and the next batch is another one.
    Args:
        max_in_a_row: skipped steps in a row that are too many; at least 1 (`train.max_skipped_steps`).
    """

    def __init__(self, max_in_a_row: int) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row must be at least 1, got {max_in_a_row}")
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0
        self.total = 0

    def update(self, skipped: bool, step: int) -> None:
        """Record whether this step was skipped. Raises TrainingError at `max_in_a_row` skipped steps in a row."""
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.max_in_a_row:
            raise TrainingError(
                f"loss or gradient was not finite for {self.in_a_row} steps in a row, up to step {step}: lower "
                "optimizer.lr, look at grad_norm and mismatch/abs_max in metrics.jsonl for the step where it began, "
                "and resume from the last checkpoint (train.max_skipped_steps sets how many are allowed)"
            )
