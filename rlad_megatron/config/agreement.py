"""How far log-probs of sampler and trainer may be apart (servers/transfer/proof.py, observe/advisories.py)."""

from __future__ import annotations

from rlad_megatron.config.tree import RunConfig

FLOAT32_BOUND = 1e-3  # nats, of engines that both compute in float32
HALF_PRECISION_FLOOR = {"mean": 0.02, "p99": 0.1}  # nats; a level below is luck


def engines_are_float32(config: RunConfig) -> bool:
    """Whether sampler and trainer both compute in float32, so that FLOAT32_BOUND holds."""
    return config.student.precision == "fp32" and config.rollout.dtype == "float32"
