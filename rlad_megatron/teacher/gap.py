"""The effect of the teacher's precision: its log-probs against a higher precision, on rollouts that a run saved."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from rlad_megatron.config import ObjectiveConfig, RunConfig, TeacherConfig
from rlad_megatron.data.samples import samples_from_rollout_files
from rlad_megatron.models.precision import precision_of, reference_of
from rlad_megatron.objectives.trrd import surrogate
from rlad_megatron.parallel.groups import ModelGroups, build_groups, seed_everything
from rlad_megatron.teacher.teacher import build_teacher
from rlad_megatron.types import Sample, TokenBatch

REPORT_FILE = "teacher_gap.json"


@dataclass(frozen=True)
class TeacherGap:
    """Differences are |own - reference| in nats over all response tokens; shares are of tokens.

    Clip and clamp decisions are TRRD's in the first update after a sync, where pi_S and pi_old sampled the tokens.
    """

    precision: str  # the teacher's own
    reference: str  # the higher precision
    rollouts: int
    tokens: int
    abs_mean: float
    abs_p99: float
    abs_max: float
    clamped: float  # share where |log pi_S - log pi_T| exceeds the clamp, by the reference
    clamp_flipped: float  # share where own precision and reference disagree on that
    tokens_with_advantage: int  # the next two are shares of these
    clipped: float
    clip_flipped: float


def teacher_gap(config: RunConfig, hooks: object) -> bool:
    """Measure the gap, print it and write `teacher_gap.json` (`rlad evaluate --teacher-gap`). Collective."""
    samples = samples_from_rollout_files(config.run_dir / "rollouts")
    groups = build_groups(config.teacher.layout)
    seed_everything(config.train.seed, groups)
    reference = reference_of(config.teacher)
    assert reference is not None  # launch/preflight.py:check_teacher_gap
    own, exact = (_score(config, model, groups, samples) for model in (config.teacher, reference))
    if dist.get_rank() == 0:
        gap = measure(samples, own, exact, config.objective, (precision_of(config.teacher), precision_of(reference)))
        (config.run_dir / REPORT_FILE).write_text(json.dumps(asdict(gap), indent=2) + "\n")
        print_gap(gap)
    return True


def _score(config: RunConfig, model: TeacherConfig, groups: ModelGroups, samples: list[Sample]) -> list[torch.Tensor]:
    teacher = build_teacher(config, model, groups)
    log_probs = teacher.log_probs(samples)
    del teacher
    gc.collect()  # modules and their hooks form cycles, and the next model needs the memory
    return log_probs


def measure(
    samples: list[Sample],
    own: list[torch.Tensor],
    reference: list[torch.Tensor],
    objective: ObjectiveConfig,
    names: tuple[str, str],
) -> TeacherGap:
    """Compare two teachers' log-probs of the samples' responses, each float32 [R]. `names`: their precisions."""
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
    return TeacherGap(
        precision=names[0],
        reference=names[1],
        rollouts=len(samples),
        tokens=difference_N.numel(),
        abs_mean=difference_N.mean().item(),
        abs_p99=difference_N.kthvalue(rank_99).values.item(),
        abs_max=difference_N.max().item(),
        clamped=theirs["clamped"].double().mean().item(),
        clamp_flipped=(ours["clamped"] != theirs["clamped"]).double().mean().item(),
        tokens_with_advantage=int(weighs_N.sum()),
        clipped=int((theirs["clipped"] & weighs_N).sum()) / count,
        clip_flipped=int(((ours["clipped"] != theirs["clipped"]) & weighs_N).sum()) / count,
    )


def print_gap(gap: TeacherGap) -> None:
    table = Table(title=f"teacher in {gap.precision} against {gap.reference}", title_justify="left", show_header=False)
    table.add_row("rollouts, response tokens", f"{gap.rollouts}, {gap.tokens}")
    table.add_row("|difference|, nats", f"mean {gap.abs_mean:.2e}, 99% {gap.abs_p99:.2e}, largest {gap.abs_max:.2e}")
    table.add_row("clamp decisions flipped", f"{gap.clamp_flipped:.3%} of tokens; the clamp binds at {gap.clamped:.3%}")
    table.add_row(
        "clip decisions flipped",
        f"{gap.clip_flipped:.3%} of {gap.tokens_with_advantage} tokens with an advantage; "
        f"the clip binds at {gap.clipped:.3%}",
    )
    Console(highlight=False).print(table)
