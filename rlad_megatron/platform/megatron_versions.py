"""What Megatron-Core lacks, in all or in some of the versions that pyproject.toml admits.

Everything above this package is written against what they have in common and never looks at a version itself.
`make test` runs the tests on the oldest version, `make test-compat` on the newest.
"""

from __future__ import annotations

import copy
import functools
import logging
from importlib.metadata import version
from pathlib import Path

from rlad_megatron.errors import CheckpointError

# What 0.19 logs of things that older versions have no other way for: by logger, how the line begins.
_EXPECTED_LINES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}


@functools.cache
def repair() -> None:
    """Give this process's Megatron-Core what it lacks. Idempotent; `platform.setup()` calls it."""
    from megatron.core.transformer.moe import moe_utils

    # 0.16 without Transformer Engine: the router compares this name with None, but nothing defines it. 0.17 does.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    _mark_torch_norms()
    for logger, begin in _EXPECTED_LINES.items():
        logging.getLogger(logger).addFilter(functools.partial(_begins_otherwise, begin))


def _begins_otherwise(begin: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(begin)


def _mark_torch_norms() -> None:
    """Let torch's norms take part in sequence parallelism, which Megatron's wrapper of them refuses (all versions).

    Under it each rank's norms see their share of the tokens, and Megatron sums the gradients of marked weights over the
    tensor-parallel group (`finalize_model_grads`). Transformer Engine's norms set the mark themselves.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build = WrappedTorchNorm.__new__

    def build_marked(cls, config, *args, **kwargs):
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = build(cls, plain, *args, **kwargs)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = build_marked


def check_loadable(folder: Path) -> None:
    """Raise CheckpointError if a checkpoint (torch_dist) was written by a Megatron-Core too new for the one installed.

    From 0.19 on, what is no tensor is an object of its own among the tensors; before, it was the file common.pt, which
    newer versions still read.
    """
    installed = version("megatron-core")
    new = (folder / ".metadata").is_file() and not (folder / "common.pt").is_file()
    if new and tuple(map(int, installed.split(".")[:2])) < (0, 19):
        raise CheckpointError(
            f"{folder}: written by Megatron-Core 0.19 or newer, which {installed} cannot load; install that version, "
            "or rewrite the model with rlad convert reshard"
        )
