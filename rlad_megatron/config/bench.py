"""The configuration of a measurement (`rlad bench`), from that of the run that it is for. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from rlad_megatron.config.tree import RunConfig

FOLDER = "bench"  # in the run folder
RESULT = "bench.json"  # in that folder
SERVERS_RESULT = "servers.json"  # of `--servers-only`
WARM_UP = 1  # steps that do not count
CPU = "CPU"  # the device of a machine without GPUs
# Figures of a server.
DECODE = "decode/step_s/"  # and the number of responses: seconds of a decode step with so many
PREFILL = "prefill/tokens_per_s"
REQUEST = "prefill/request_s"  # of a prompt, besides its tokens


def bench_config(config: RunConfig, steps: int) -> RunConfig:
    """The configuration of a measurement of so many steps: with its own folder in the run's."""
    return replace(
        config,
        runs_dir=str(config.run_dir),
        name=FOLDER,
        resume=False,
        resume_step=0,
        train=replace(config.train, steps=steps + WARM_UP),
        observe=replace(config.observe, tensorboard=False, wandb_project=""),
    )


def decode_lengths(longest: int) -> tuple[int, int]:
    """Tokens in the cache of each response at the start of a measurement of decoding, and tokens that it decodes.

    longest: response. The cache holds half of an assumed prompt, and half of a response of average length.
    """
    return min(longest, 512) // 2 + longest // 4 + 1, max(2, min(longest, 64))


def servers_bench_config(config: RunConfig, steps: int) -> RunConfig:
    """The same for a measurement of one server."""
    config = bench_config(config, steps)
    return replace(config, rollout=replace(config.rollout, servers=1, nodes=0, colocate=False))
