"""Every scale factor between the loss of a micro-batch and the gradient of a step.

Derivation. The loss of an update is L = -sum over all tokens of all samples of w_t * s_t, with s_t the
surrogate and w_t its weight; the weights already hold the one global division (objectives/aggregate.py).
So the gradient is the plain sum of the gradients of the parts, however the samples fall into
micro-batches and data-parallel ranks. Megatron sums exactly so when told that it works per token:

- `calculate_per_token_loss=True`: the schedule does not divide by the number of micro-batches, and
  DistributedDataParallel sums over data-parallel ranks instead of averaging (its gradient_scaling_factor is 1);
- `finalize_model_grads` would then divide by the number of tokens that the loss function reports:
  it gets none, so it does not divide.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection


def sum_gradients(collection: ProcessGroupCollection) -> Callable[..., None]:
    """Megatron's `finalize_model_grads_func` that synchronises gradients and divides by nothing."""

    def finalize(model, num_tokens=None, pg_collection=None, **kwargs) -> None:
        finalize_model_grads(model, None, pg_collection=collection, **kwargs)

    return finalize


def no_tokens(device: torch.device) -> torch.Tensor:
    """What a loss function reports as its number of tokens: zero, so that Megatron does not divide by it."""
    return torch.zeros((), dtype=torch.int, device=device)
