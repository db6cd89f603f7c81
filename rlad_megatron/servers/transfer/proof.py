"""The decode probe: after a sync, do the servers compute with the weights that the trainer has?

The probe decodes, because checks of prompt log-probs have missed real bugs: prefill and decode are different code
paths, and only one of them may see new weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rlad_megatron.errors import WeightSyncError
from rlad_megatron.servers.client import Completion
from rlad_megatron.types import Sample


def probe_sample(prompt_tokens: Sequence[int], decoded: Completion) -> Sample:
    """What a server decoded, for the trainer to score."""
    return Sample(
        tokens=torch.tensor([*prompt_tokens, *decoded.tokens]),
        prompt_length=len(prompt_tokens),
        weight=torch.zeros(len(decoded.tokens)),
    )


def verify_probe(
    sampler_log_probs: Sequence[float], trainer_log_probs: Sequence[float], bound: float, server: str
) -> float:
    """Largest |difference| in nats between two lists of log-probs of the same tokens.

    Raises WeightSyncError if it is beyond `bound` or not a number.
    """
    pairs = list(zip(sampler_log_probs, trainer_log_probs, strict=True))
    differences = [abs(sampler - trainer) for sampler, trainer in pairs]
    differences = [math.inf if math.isnan(difference) else difference for difference in differences]
    worst = max(range(len(pairs)), key=differences.__getitem__)
    if differences[worst] > bound:
        sampler, trainer = pairs[worst]
        raise WeightSyncError(
            f"{server} and the trainer disagree by {differences[worst]:.3g} nats at decoded token {worst} "
            f"(server {sampler:.6f}, trainer {trainer:.6f}; rollout.probe_bound={bound:g}): the server does not "
            f"compute with the trainer's weights, or rollout.dtype and student.precision differ; with reduced "
            f"precision raise rollout.probe_bound"
        )
    return differences[worst]
