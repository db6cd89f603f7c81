"""What differs between the versions of Megatron-Core that pyproject.toml admits, and nothing else does.

Everything above this package is written against what they have in common and never looks at a version itself.
`make test` runs the tests on the oldest version, `make test-compat` on the newest.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from rlad_megatron.errors import CheckpointError


def repair() -> None:
    """Give this process's Megatron-Core what one of its versions lacks. Idempotent; `platform.setup()` calls it."""
    from megatron.core.transformer.moe import moe_utils

    # 0.16 without Transformer Engine: the router compares this name with None, but nothing defines it. 0.17 does.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


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
