"""Accuracy of a model on held-out prompts, served by vLLM: no trainer, no process group."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from rlad_megatron import platform
from rlad_megatron.config import RunConfig
from rlad_megatron.config.placement import server_devices
from rlad_megatron.data.prompts import build_prompts
from rlad_megatron.data.tokenizers import load_tokenizer
from rlad_megatron.rewards.accuracy import accuracy_metrics
from rlad_megatron.rewards.registry import load_reward
from rlad_megatron.rewards.scoring import apply_scores, score_responses
from rlad_megatron.servers.fleet import ServerFleet, generate_groups

SEEDS_PER_RUN = 1_000_003
EVALUATION = -1  # evaluation draws the same numbers each time, so that its figures differ by the weights alone


def batch_seed(config: RunConfig, batch: int) -> int:
    """Seed of one batch of rollouts, for example of a step. Runs whose train.seed differ share none."""
    return config.train.seed * SEEDS_PER_RUN + batch


def evaluate_model(config: RunConfig, model_path: str) -> dict[str, float]:
    """Metrics (`eval/...`) of the model in `model_path` on the config's held-out prompts, with the config's sampling.

    Starts the config's servers, or uses its URLs, which must then serve that model.
    """
    tokenizer = load_tokenizer(model_path)
    prompts = build_prompts(config.data, tokenizer, "test")
    reward = load_reward(config.data.reward)
    longest = max(len(prompt.tokens) for prompt in prompts)
    devices = server_devices(config, platform.visible_devices(), alone=True)
    print(f"evaluating {model_path} on {len(prompts)} prompts; starting its servers first", flush=True)
    # Logs of its own: the run's servers have theirs beside it.
    with ServerFleet(config.rollout, config.run_dir / "evaluate", devices=devices) as fleet:
        fleet.start(model_path, longest + config.eval.sampling.max_tokens, tokenizer.eos_ids)
        groups = generate_groups(
            fleet,
            prompts,
            config.eval.samples,
            config.eval.sampling,
            seed=batch_seed(config, EVALUATION),
            weight_version=0,
            push_weights=lambda servers: None,  # a restarted server loads the model's folder, which is all there is
        )
    rollouts = [rollout for group in groups for rollout in group]
    apply_scores(rollouts, score_responses(rollouts, tokenizer, reward))
    return accuracy_metrics(groups)


def print_accuracy(title: str, metrics: dict[str, float]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in metrics.items():
        table.add_row(name.removeprefix("eval/"), f"{value:.3f}")
    Console().print(table)
