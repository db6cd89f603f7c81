"""What there is to compare: the finished runs of a study, or any run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlad_megatron.config import RunConfig
from rlad_megatron.config.messages import shown
from rlad_megatron.config.recipe import by_key, from_yaml
from rlad_megatron.errors import ConfigError
from rlad_megatron.observe.panels import finite_values
from rlad_megatron.study.definition import TEACHER, StudyPlan, Tuned
from rlad_megatron.study.page import write_page, write_results
from rlad_megatron.study.progress import (
    Metrics,
    best,
    final,
    is_finished,
    read_evaluation,
    run_metrics,
    state_of,
    tuned_accuracies,
)
from rlad_megatron.study.summary import Comparison, summarise
from rlad_megatron.trainer.run_state import CONFIG

RESULTS = Path("studies/results")
# In these the runs of one arm may differ.
OF_A_RUN = ("name", "runs_dir", "resume", "resume_step", "train.seed", "rollout.port")
LONGEST_LABEL = 60  # characters


def write_study_report(plan: StudyPlan, code: str) -> Path:
    """Write `studies/results/NAME/` from the runs that have finished; returns the report.

    code: the version of the code, for the page.
    """
    folder = RESULTS / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    write_results(study_comparison(plan, code), folder)
    return folder / "report.html"


def study_comparison(plan: StudyPlan, code: str) -> Comparison:
    """The finished runs of a study, what was chosen, and what is missing."""
    study = plan.study
    arms: dict[str, dict[int, Metrics]] = {arm: {} for arm in study.arms}
    for task in plan.tasks:
        if task.kind == "run" and is_finished(plan, task):
            arms[task.arm][task.seed] = run_metrics(plan.folder_of(task))
    tuned: dict[str, dict[str, Any]] = {
        arm: {"seed": given.seed, "accuracies": tuned_accuracies(plan, arm), "chosen": best(plan, arm)}
        for arm, given in study.arms.items()
        if isinstance(given, Tuned)
    }
    return Comparison(
        title=plan.name,
        arms=arms,
        baselines=study.baselines,
        teacher=read_evaluation(plan.folder / TEACHER),
        facts=(
            ("Student", Path(study.base.student.path).name),
            ("Teacher", Path(study.base.teacher.path).name),
            ("Steps", str(study.steps)),
            ("Seeds", ", ".join(map(str, study.seeds))),
            ("Code", code),
        ),
        tuned=tuned,
        not_run=[(task.title, state_of(plan, task)) for task in plan.tasks if not is_finished(plan, task)],
    )


def write_run_comparison(folders: Sequence[str], file: Path) -> None:
    """Compare any runs on one page: those that differ only in their seed are one arm, the first is the baseline.

    Raises:
        ConfigError: a folder is no run, or two runs have the same configuration and seed.
    """
    comparison = run_comparison(list(map(Path, folders)))
    write_page(comparison, summarise(comparison), file)


def run_comparison(folders: Sequence[Path]) -> Comparison:
    """Raises as `write_run_comparison`."""
    runs: dict[Path, tuple[dict[str, Any], RunConfig, Metrics]] = {}
    for folder in folders:
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"{folder}: no {CONFIG}; give run folders, for example runs/NAME")
        if not (metrics := run_metrics(folder)):
            raise ConfigError(f"{folder}: no step has been written yet; leave it out")
        config = from_yaml(folder / CONFIG)
        keys = {key: value for key, value in by_key(asdict(config)).items() if key not in OF_A_RUN}
        runs[folder] = keys, config, metrics
    groups: list[list[Path]] = []
    for folder, (keys, *_) in runs.items():
        group = next((group for group in groups if runs[group[0]][0] == keys), None)
        if group is None:
            groups.append([folder])
        else:
            group.append(folder)
    for group in groups:
        seeds = {runs[folder][1].train.seed: folder for folder in group}
        for folder in group:
            seed = runs[folder][1].train.seed
            if seeds[seed] != folder:
                raise ConfigError(
                    f"{folder} and {seeds[seed]} have the same configuration and train.seed={seed}; leave one out"
                )
    labels = _labels([(group[0].name, runs[group[0]][0]) for group in groups])
    teacher = {value for _, _, metrics in runs.values() for value in finite_values("eval/teacher_accuracy", metrics)}
    facts = [(label, ", ".join(map(str, group))) for label, group in zip(labels, groups, strict=True)]
    ends = {last["step"] for _, _, metrics in runs.values() if (last := final(metrics))}
    if len(ends) > 1:
        steps = ", ".join(f"{step:g}" for step in sorted(ends))
        facts.append(("Note", f"the last evaluations are at steps {steps}: differences compare unequal training"))
    return Comparison(
        title="Comparison of runs",
        arms={
            label: {runs[folder][1].train.seed: runs[folder][2] for folder in group}
            for label, group in zip(labels, groups, strict=True)
        },
        baselines=labels[:1],
        teacher={"eval/accuracy": teacher.pop()} if len(teacher) == 1 else {},
        facts=facts,
    )


def _labels(groups: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Of each group what it differs in, or the name of its first run if that is nothing or long."""
    differing = [key for key in groups[0][1] if any(keys[key] != groups[0][1][key] for _, keys in groups)]
    labels = [", ".join(f"{key}={shown(keys[key])}" for key in differing) for _, keys in groups]
    if all(label and len(label) <= LONGEST_LABEL for label in labels):
        return labels
    names = [name for name, _ in groups]
    return names if len(set(names)) == len(names) else [f"{name} ({number})" for number, name in enumerate(names, 1)]
