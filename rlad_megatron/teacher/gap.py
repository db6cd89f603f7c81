"""The effect of the teacher's precision: its log-probs against a higher precision, on rollouts that a run saved."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from rlad_megatron.config import ObjectiveConfig, RunConfig
from rlad_megatron.data.samples import samples_from_rollout_files
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.models.precision import precision_of, reference_of
from rlad_megatron.objectives.trrd import surrogate
from rlad_megatron.parallel.groups import build_groups, seed_everything
from rlad_megatron.teacher.teacher import build_teacher
from rlad_megatron.types import Sample, TokenBatch


def teacher_gap(config: RunConfig, hooks: object) -> bool:
    """Measure the gap, print it and write `teacher_gap.json` (`rlad evaluate --teacher-gap`). Collective."""
    samples = samples_from_rollout_files(config.run_dir / "rollouts")
    groups = build_groups(config.teacher.layout, config.train.distributed_timeout_s)
    seed_everything(config.train.seed, groups)
    reference = reference_of(config.teacher)
    assert reference is not None  # launch/preflight.py:check_teacher_gap
    spec, scores = read_model_spec(config.teacher.path), []
    for model in (config.teacher, reference):
        scores.append(build_teacher(config, model, spec, groups).log_probs(samples))
        gc.collect()  # modules and their hooks form cycles, and the next model needs the memory
    if dist.get_rank() == 0:
        own, exact = scores
        names = {"precision": precision_of(config.teacher), "reference": precision_of(reference)}
        gap = names | measure(samples, own, exact, config.objective)
        (config.run_dir / "teacher_gap.json").write_text(json.dumps(gap, indent=2) + "\n")
        print_gap(gap)
    return True


def measure(
    samples: list[Sample], own: list[torch.Tensor], reference: list[torch.Tensor], objective: ObjectiveConfig
) -> dict[str, Any]:
    """Compare two teachers' log-probs of the samples' responses, each float32 [R].

    Differences are |own - reference| in nats over all response tokens; shares are of tokens.
    Clip and clamp decisions are TRRD's in the first update after a sync, where pi_S and pi_old sampled the tokens.
    """
    own_N, reference_N = torch.cat(own), torch.cat(reference)
    student_N = torch.cat([sample.sampler_log_probs for sample in samples])
    advantage_N = torch.cat([torch.full((sample.response_length,), sample.advantage) for sample in samples])

    batch = TokenBatch(torch.ones_like(advantage_N), advantage_N, old_log_probs=student_N)
    (_, ours), (_, theirs) = (
        surrogate(student_N, replace(batch, teacher_log_probs=teacher_N), objective)
        for teacher_N in (own_N, reference_N)
    )
    difference_N = (own_N - reference_N).abs().double()
    weighs_N = advantage_N != 0
    count = max(int(weighs_N.sum()), 1)
    rank_99 = -(-difference_N.numel() * 99 // 100)
    return {
        "rollouts": len(samples),
        "tokens": difference_N.numel(),
        "abs_mean": difference_N.mean().item(),
        "abs_p99": difference_N.kthvalue(rank_99).values.item(),
        "abs_max": difference_N.max().item(),
        # Where |log pi_S - log pi_T| exceeds the clamp by the reference, and where own precision disagrees with that.
        "clamped": theirs["clamped"].double().mean().item(),
        "clamp_flipped": (ours["clamped"] != theirs["clamped"]).double().mean().item(),
        "tokens_with_advantage": int(weighs_N.sum()),
        # Shares of the tokens with an advantage.
        "clipped": int((theirs["clipped"] & weighs_N).sum()) / count,
        "clip_flipped": int(((ours["clipped"] != theirs["clipped"]) & weighs_N).sum()) / count,
    }


def print_gap(gap: dict[str, Any]) -> None:
    rows = {
        "rollouts, response tokens": "{rollouts}, {tokens}",
        "|difference|, nats": "mean {abs_mean:.2e}, 99% {abs_p99:.2e}, largest {abs_max:.2e}",
        "clamp decisions flipped": "{clamp_flipped:.3%} of tokens; the clamp binds at {clamped:.3%}",
        "clip decisions flipped": "{clip_flipped:.3%} of {tokens_with_advantage} tokens with an advantage; "
        "the clip binds at {clipped:.3%}",
    }
    title = "teacher in {precision} against {reference}".format_map(gap)
    table = Table(title=title, title_justify="left", show_header=False)
    for label, text in rows.items():
        table.add_row(label, text.format_map(gap))
    Console(highlight=False).print(table)
