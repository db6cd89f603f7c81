"""The decode probe: after a sync, do the servers compute with the weights that the trainer has?

The probe decodes, because checks of prompt log-probs have missed real bugs: prefill and decode are different code
paths, and only one of them may see new weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlad_megatron.errors import WeightSyncError


def verify_probe(sampler_log_probs: Sequence[float], trainer_T: torch.Tensor, bound: float, server: str) -> float:
    """Largest |difference| in nats between log-probs of the same T tokens.

    Raises WeightSyncError if it is beyond `bound` or not a number.
    """
    sampler_T = torch.tensor(sampler_log_probs, dtype=torch.float64)
    difference_T = (sampler_T - trainer_T).abs()
    worst = int(difference_T.argmax())  # the first that is not a number, if there is one
    difference = difference_T[worst].item()
    if not difference <= bound:
        raise WeightSyncError(
            f"{server} and the trainer disagree by {difference:.3g} nats at decoded token {worst} "
            f"(server {sampler_T[worst]:.6f}, trainer {trainer_T[worst]:.6f}; rollout.probe_bound={bound:g}): the "
            "server does not compute with the trainer's weights, or rollout.dtype and student.precision differ; with "
            "reduced precision raise rollout.probe_bound"
        )
    return difference
