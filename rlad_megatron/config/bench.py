"""The configuration of a measurement (`rlad bench`), from that of the run that it is for. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from rlad_megatron.config.tree import RunConfig

FOLDER = "bench"  # in the run folder
RESULT = "bench.json"  # in that folder
WARM_UP = 1  # steps that do not count


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
