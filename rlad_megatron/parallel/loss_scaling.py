"""Every scale factor between the loss of a micro-batch and the gradient of a step.

Derivation. The loss of an update is L = -sum(w_t * s_t) over all tokens of all samples, with surrogate s_t and
weight w_t. The weights already contain the one global division (objectives/aggregate.py), so the gradient is the plain
sum over micro-batches, data-parallel ranks and context-parallel ranks: each of the latter has the losses of its own
tokens only (parallel/context.py), and the gradients of its copy of the weights from these tokens. Keys and values that
attention sends between them carry gradients back to the rank of their token (models/attention.py, Transformer Engine).
Two settings make Megatron compute that sum:

- `calculate_per_token_loss=True`: the schedule does not divide by the number of micro-batches, and
  DistributedDataParallel sums over its group, DP x CP, instead of averaging (its gradient_scaling_factor is 1). With a
  loss function that returns (loss, number of tokens, report), as ours does, the schedule has no factor for context
  parallelism. It multiplies the loss by the CP size only if it gets a pair, to undo that average.
- `finalize_model_grads` would then divide by the number of tokens that the loss function reports. It gets None, so it
  does not divide.

Experts. A pipeline stage has R = TP * CP * DP ranks, and each token of the update is on one of them when it meets the
router (with TP above 1 by sequence parallelism). The ranks form R / (ETP * EP) groups that hold all experts once, and
the all-to-all of a group brings an expert the tokens of the group's ranks, each once. So backward leaves on a rank the
sum over its group's tokens: w_t and the weight of the router are in their gradients already. The groups partition the R
ranks, so the sum over the R / (ETP * EP) ranks that hold the same part of the same expert (its own data-parallel group)
counts every token once. DistributedDataParallel has a second set of buffers for it, whose factor is 1 by the same
setting. With EP = 1 and ETP = TP this group is the data-parallel one, and the experts' gradients are in the first set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection


def sum_gradients(collection: ProcessGroupCollection) -> Callable[..., None]:
    """A `finalize_model_grads_func` for Megatron that synchronises gradients without dividing them."""

    def finalize(model, num_tokens=None, pg_collection=None, **kwargs) -> None:
        finalize_model_grads(model, None, pg_collection=collection, **kwargs)

    return finalize


@contextmanager
def unreduced_gradients(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Backward passes in here add to this rank's gradients; `reduce_gradients` sums them over ranks."""
    config = chunks[0].module.config
    finalize, no_sync = config.finalize_model_grads_func, config.no_sync_func
    # Megatron's schedules would leave `no_sync` for their last micro-batch.
    config.finalize_model_grads_func, config.no_sync_func = None, nullcontext
    try:
        with ExitStack() as stack:
            for chunk in chunks:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = finalize, no_sync


@contextmanager
def earlier_gradients_kept(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Passes in here may follow others of the same update.

    Megatron's schedules mark their first micro-batch for Transformer Engine's FP8 layers. For it those quantize their
    weights again, which they need only once an update, and write its weight gradients over the buffer.
    """
    for chunk in chunks:
        chunk.set_is_first_microbatch = lambda: None
    try:
        yield
    finally:
        for chunk in chunks:
            del chunk.set_is_first_microbatch


def reduce_gradients(chunks: list[DistributedDataParallel]) -> None:
    """Sum over ranks the gradients that `unreduced_gradients` has left."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_grad_reduce:
            chunk.start_grad_sync()
    chunks[0].module.config.finalize_model_grads_func(chunks)


def no_tokens(device: torch.device) -> torch.Tensor:
    """The number of tokens a loss function reports to Megatron: 0, because it is not used."""
    return torch.zeros((), dtype=torch.int, device=device)
