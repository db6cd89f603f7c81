"""Checks that stop a run which no longer learns."""

from __future__ import annotations

from rlad_megatron.errors import TrainingError


class NonFiniteGuard:
    """Stops the run after too many steps in a row were skipped for a non-finite loss or gradient.

    A single one does no harm: the parameters keep their values and the next batch differs.
    Args:
        max_in_a_row: `train.max_skipped_steps`.
    """

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0

    def update(self, skipped: bool, step: int) -> None:
        """Record whether this step was skipped. Raises TrainingError at `max_in_a_row` skipped steps in a row."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= self.max_in_a_row:
            raise TrainingError(
                f"loss or gradient was not finite for {self.in_a_row} steps in a row, up to step {step}: lower "
                "optimizer.lr, find the step where it began by grad_norm and mismatch/abs_max in metrics.jsonl, and "
                f"resume from the last checkpoint (train.max_skipped_steps={self.max_in_a_row} is the limit)"
            )
