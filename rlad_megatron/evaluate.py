"""Accuracy of a model on held-out prompts, served by vLLM: no trainer, no process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.placement import server_devices
from rlad_megatron.data.prompts import build_prompts
from rlad_megatron.data.table import Prompts
from rlad_megatron.data.tokenizers import Tokenizer, load_tokenizer
from rlad_megatron.models.config_json import read_model_spec, read_specs
from rlad_megatron.observe.summary import summary_table
from rlad_megatron.rewards.accuracy import accuracy_metrics
from rlad_megatron.rewards.pool import RewardPool, score_groups
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.sampling import fitting_prompts, max_model_len
from rlad_megatron.types import EVALUATION

FOLDER = "evaluate"  # in the run folder, which holds the run's own logs


def evaluate_model(config: RunConfig, model_path: str) -> dict[str, float]:
    """Metrics (`eval/...`) of the model in `model_path` on the config's held-out prompts, with the config's sampling.

    Starts the config's servers, or uses its URLs, which must then serve that model.
    """
    tokenizer = load_tokenizer(model_path)
    prompts, _ = fitting_prompts(config, read_specs(config), build_prompts(config.data, tokenizer, "test"), "test")
    print(f"evaluating {model_path} on {len(prompts)} prompts; starting its servers first", flush=True)
    with serve(config, model_path, tokenizer, prompts, config.run_dir / FOLDER) as fleet:
        groups = fleet.generate(prompts, config.eval.samples, config.eval.sampling, batch=EVALUATION)
    return accuracy_metrics(groups)


@contextmanager
def serve(
    config: RunConfig, model_path: str, tokenizer: Tokenizer, prompts: Prompts, run_dir: Path
) -> Iterator[ServerFleet]:
    """The config's servers, with the model for these prompts, and its reward for what they answer.

    run_dir: for their logs.
    """
    with RewardPool(config.data, run_dir) as rewards:
        fleet = ServerFleet(
            config,
            model_path=model_path,
            max_model_len=max_model_len(config, prompts),
            vocab_size=read_model_spec(model_path).vocab_size,
            eos_ids=tokenizer.eos_ids,
            run_dir=run_dir,
            devices=server_devices(config, platform.visible_devices(), alone=True),
            stages=[partial(score_groups, tokenizer=tokenizer, pool=rewards)],
        )
        with fleet:
            yield fleet


def print_accuracy(title: str, metrics: dict[str, float]) -> None:
    rows = [(name.removeprefix("eval/"), f"{value:.3f}") for name, value in metrics.items()]
    summary_table(title, rows, Console())
