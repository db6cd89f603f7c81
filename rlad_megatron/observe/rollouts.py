"""Metrics of a step's rollouts, a few of them as text, and the step's line on the terminal."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from rlad_megatron.objectives.advantages import group_advantages
from rlad_megatron.types import Rollout, Sample


def reward_metrics(groups: list[list[Rollout]], *, trained: int, version: int) -> dict[str, float]:
    """Metrics of a step's rollouts.

    trained: number of responses that carry a gradient. version: of the weights that they are trained on.
    """
    rollouts = [rollout for group in groups for rollout in group]
    count = len(rollouts)
    parts: dict[str, float] = defaultdict(float)
    for rollout in rollouts:
        for name, value in rollout.reward_parts.items():
            parts[f"reward/{name}"] += value / count
    lengths = [len(rollout.tokens) for rollout in rollouts]
    lags = [(version - sampled_with, tokens) for rollout in rollouts for sampled_with, tokens in rollout.versions]
    return {
        "reward/mean": sum(rollout.reward for rollout in rollouts) / count,
        "reward/solved": sum(rollout.solved for rollout in rollouts) / count,
        **parts,
        "rollout/trained_fraction": trained / count,
        "rollout/cut_fraction": sum(rollout.finish_reason == "length" for rollout in rollouts) / count,
        "rollout/response_tokens": sum(lengths) / count,
        "rollout/version_lag_mean": sum(lag * tokens for lag, tokens in lags) / max(sum(lengths), 1),
        "rollout/version_lag_max": float(max((lag for lag, _ in lags), default=0)),
        "tokens/rollout": float(sum(lengths)),
    }


# How the metrics of several updates are combined, if not by their mean.
_COMBINE: dict[str, Callable[[list[float]], float]] = {
    "tokens/train": sum,
    "mismatch/abs_max": max,
    "lr": lambda values: values[-1],
    "train/skipped": sum,
}


def mean_of_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step from those of its updates; each metric over the updates that have it."""
    combined = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update[name] for update in updates if name in update]
        combined[name] = _COMBINE[name](values) if name in _COMBINE else sum(values) / len(values)
    return combined


def write_rollouts(
    run_dir: Path,
    step: int,
    groups: list[list[Rollout]],
    samples: Sequence[Sample | None],
    pieces: Callable[[list[int]], list[str]],
    *,
    std: bool = True,
) -> None:
    """Write `rollouts/step_<step>.jsonl`: one JSON object for the first rollout of each group.

    The text is for people, tokens and numbers are for `rlad watch` and `data/samples.py:samples_from_rollout_files`.
    Log-probs are in nats; numbers of tokens are rounded to 5 digits.

    Args:
        samples: of each group's first rollout, with what is known of its tokens; None if it is not trained on.
        pieces: the text of each token of a response.
        std: as in `group_advantages`.
    """
    if not groups:
        return
    rewards_PG = torch.tensor([[rollout.reward for rollout in group] for group in groups], dtype=torch.float64)
    advantages_PG, _ = group_advantages(rewards_PG, std=std)
    folder = run_dir / "rollouts"
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps(
            {
                "step": step,
                "id": rollout.prompt.id,
                "subset": rollout.prompt.subset,
                "prompt": rollout.prompt.text,
                "response": rollout.text,
                "answer": rollout.prompt.answer,
                "reward": rollout.reward,
                "advantage": advantage,
                "solved": rollout.solved,
                "finish_reason": rollout.finish_reason,
                "weight_versions": rollout.versions,
                # Lists read only what stands before this (rollout_index.py).
                "prompt_tokens": rollout.prompt.tokens,
                "response_tokens": rollout.tokens,
                "response_pieces": pieces(rollout.tokens),
                "log_probs": _rounded(rollout.log_probs),
                **({} if sample is None else _trained_figures(sample)),
            },
            ensure_ascii=False,
        )
        for (rollout, *_), advantage, sample in zip(groups, advantages_PG[:, 0].tolist(), samples, strict=True)
    ]
    (folder / f"step_{step:08d}.jsonl").write_text("\n".join(lines) + "\n")


def _trained_figures(sample: Sample) -> dict[str, list[float | None]]:
    """What the trainer knows of a response's tokens: `student_log_probs` and the rest as the update saw them.

    A statistic keeps its name (objectives/registry.py); `mismatch` is log pi_old - log pi_sampler. Without a pass for
    pi_old that is the update's pi_S.
    """
    stats = dict(sample.token_stats or {})
    student = stats.pop("log_probs", None)
    old = student if sample.old_log_probs is None else sample.old_log_probs
    found = {"student_log_probs": student, "old_log_probs": old, "teacher_log_probs": sample.teacher_log_probs, **stats}
    figures = {name: _rounded(values) for name, values in found.items() if values is not None}
    if old is not None and sample.sampler_log_probs is not None:  # too small in float32 for rounded log-probs to show
        gaps = (old - sample.sampler_log_probs).tolist()
        figures["mismatch"] = [float(f"{gap:.3g}") if math.isfinite(gap) else None for gap in gaps]
    return figures


def _rounded(values: Sequence[float] | torch.Tensor) -> list[float | None]:
    """JSON has no NaN, which a diverged student computes."""
    rounded = np.asarray(values, dtype=np.float64).round(5)
    if np.isfinite(rounded).all():
        return rounded.tolist()
    return [value if math.isfinite(value) else None for value in rounded.tolist()]


def drop_rollouts_after(run_dir: Path, step: int) -> None:
    """On resume: remove the files of later steps, which are repeated with other weights, or not at all."""
    for file in (run_dir / "rollouts").glob("step_*.jsonl"):
        if int(file.stem.removeprefix("step_")) > step:
            file.unlink()


def step_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """The step's line on the terminal: the figures that people watch, if they were measured."""
    shown = (
        ("reward", "reward/mean", ".3f"),
        ("solved", "reward/solved", ".3f"),
        ("loss", "loss/policy", ".4f"),
        ("grad", "grad_norm", ".3f"),
        ("mismatch", "mismatch/abs_max", ".1e"),
        ("held-out", "eval/accuracy", ".3f"),
        ("teacher", "eval/teacher_accuracy", ".3f"),
        ("s", "time/step", ".1f"),
    )
    figures = [f"{label} {metrics[key]:{form}}" for label, key, form in shown if key in metrics]
    return f"step {step:>{len(str(steps))}}/{steps}  " + "  ".join(figures)
