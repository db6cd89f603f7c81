"""Patches for Megatron-Core, in all or some of the versions that pyproject.toml allows.

Packages above this one use only what those versions have in common and never check a version.
`make test` runs the tests with the newest version, `make test-compat` with the oldest.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import queue
import warnings
from importlib.metadata import version
from pathlib import Path

from rlad_megatron.errors import CheckpointError

# Logger -> prefix of a deprecation message of 0.19 for which older versions have no alternative.
_EXPECTED_MESSAGES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "megatron.core.tensor_parallel.random": "CPU RNG state changed",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}
# What torch warns of when Megatron-Core loads a checkpoint, and Megatron-Core when it is imported.
_EXPECTED_WARNINGS = (
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "MimoModelConfig is experimental",
)


@functools.cache
def patch() -> None:
    """Patch Megatron-Core in this process. Idempotent. `platform.setup()` calls it."""
    # First: importing Megatron-Core says some of these.
    for logger, prefix in _EXPECTED_MESSAGES.items():
        logging.getLogger(logger).addFilter(functools.partial(_lacks_prefix, prefix))
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer.moe import moe_utils

    # 0.16 without Transformer Engine: the router compares this name with None, but only 0.17 and later define it.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    _save_states_of_padded_buckets()
    _order_groups_by_dtype()
    # Saves are synchronous, so results do not leave this process. Megatron-Core starts another one for them (286 MB),
    # which would outlive a rank that is killed.
    filesystem_async._results_queue = queue.Queue()


def _lacks_prefix(prefix: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(prefix)


def _save_states_of_padded_buckets() -> None:
    """Save each parameter's own optimizer state (0.16 to 0.19; Megatron-LM's pull request 5077 fixes later versions).

    Megatron joins the states of a buffer's buckets without the padding at their ends, but cuts parameters out where
    they lie with it. From the second bucket on (tied embeddings on two stages have one) the states were shifted by the
    padding of those before.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    save = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(save)
    def save_without_padding(self, *args, **kwargs):
        maps = [buffer.param_index_map for buffer in self.buffers]
        for buffer, padded in zip(self.buffers, maps, strict=True):
            padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
            buffer.param_index_map = {
                parameter: (start - sum(padding[:bucket]), end - sum(padding[:bucket]), bucket)
                for parameter, (start, end, bucket) in padded.items()
            }
        try:
            return save(self, *args, **kwargs)
        finally:
            for buffer, padded in zip(self.buffers, maps, strict=True):
                buffer.param_index_map = padded

    DistributedOptimizer.sharded_param_state_fully_reshardable = save_without_padding


def _order_groups_by_dtype() -> None:
    """Find the optimizer's state of each parameter where a group has two dtypes (0.16 to 0.19).

    Megatron counts a group's parameters in the order of its buffers, but puts float32 ones first when it makes the
    optimizer's list. It would save, and load, one parameter's state as another's.
    """
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    build = DistributedOptimizer._build_optimizer_group_ranges

    def build_in_order(param_groups, buffer_ranges):
        places, groups = build(param_groups, buffer_ranges)
        for number, group in enumerate(groups):
            group["params"].sort(key=lambda parameter: parameter.dtype is not torch.float32)
            places |= {parameter: (number, place) for place, parameter in enumerate(group["params"])}
        return places, groups

    DistributedOptimizer._build_optimizer_group_ranges = staticmethod(build_in_order)


def missing_for_gated_delta_nets(*, gpu: bool) -> str:
    """What is not installed of what gated delta nets over packed sequences need; empty if nothing."""
    installed = version("megatron-core")
    if _release(installed) < (0, 19):
        return f"Megatron-Core 0.19 or newer (Python 3.12), and {installed} is installed"
    if gpu and importlib.util.find_spec("fla") is None:
        return "flash-linear-attention on GPUs"
    return ""


def _release(installed: str) -> tuple[int, ...]:
    return tuple(map(int, installed.split(".")[:2]))


def check_loadable(folder: Path) -> None:
    """Raise CheckpointError if the installed Megatron-Core is too old to load a checkpoint (torch_dist).

    Since 0.19, objects that are not tensors are stored among the tensors. Before, they were in the file common.pt,
    which newer versions still read.
    """
    installed = version("megatron-core")
    new = (folder / ".metadata").is_file() and not (folder / "common.pt").is_file()
    if new and _release(installed) < (0, 19):
        raise CheckpointError(
            f"{folder}: written by Megatron-Core 0.19 or newer, which {installed} cannot load; install that version, "
            "or rewrite the model with rlad convert reshard"
        )
