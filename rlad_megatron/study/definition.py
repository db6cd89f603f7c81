"""What a study is: arms, seeds and steps, and the configuration of each of its runs. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from rlad_megatron.config import RunConfig, validate
from rlad_megatron.config.fields import CHECKED, Count, NonNegativeInt
from rlad_megatron.config.recipe import apply_overrides, call_file, function_names
from rlad_megatron.errors import ConfigError

# It is part of the names of run folders and of tasks.
ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
Overrides = tuple[str, ...]
TEACHER = "teacher"
# What the study sets itself, for each run.
OWN_KEYS = ("name", "runs_dir", "resume", "resume_step", "train.seed", "eval.teacher", "checkpoint.export_hf")


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Tuned:
    """An arm of which one variant is chosen first: that with the best final held-out accuracy at a seed of its own.

    Example: Tuned({"0.001": ("objective.kl_coefficient=0.001",), "0.01": ("objective.kl_coefficient=0.01",)}, seed=0)
    """

    candidates: dict[ArmName, Overrides]  # variant -> `key=value` strings
    seed: NonNegativeInt  # not one of the study's: what chose the variant must not count for it


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Study:
    """Arms that are compared, each run with every seed. A function in `studies/` returns one.

    An arm whose objective trains on traces runs as `rlad sft`, and its student is evaluated afterwards.
    """

    base: RunConfig
    arms: dict[ArmName, Overrides | Tuned]  # `key=value` strings as on the command line
    seeds: tuple[NonNegativeInt, ...]  # train.seed: the order of prompts, and what is sampled
    steps: Count  # train.steps, unless an arm overrides it
    baselines: tuple[str, ...]  # arms from which the other arms' paired differences are taken


@dataclass(frozen=True)
class Task:
    """One run of a study, or the evaluation of its teacher."""

    name: str  # of its folder
    kind: Literal["teacher", "candidate", "run"]
    arm: str = ""
    seed: int = 0
    candidate: str = ""

    @property
    def title(self) -> str:
        """For people."""
        of = f" {self.candidate}" if self.candidate else ""
        return TEACHER if self.kind == "teacher" else f"{self.arm}{of}, seed {self.seed}"


@dataclass(frozen=True)
class StudyPlan:
    """A study with its name, and what it consists of."""

    name: str
    study: Study

    @property
    def folder(self) -> Path:
        """Of the runs."""
        return Path(self.study.base.runs_dir) / self.name

    @cached_property
    def tasks(self) -> list[Task]:
        """In their order: the teacher, variants to choose from, then all arms of the first seed, of the second ..."""
        study, tasks = self.study, []
        if study.base.eval.teacher:
            tasks.append(Task(TEACHER, "teacher"))
        for arm, given in study.arms.items():
            if isinstance(given, Tuned):
                tasks += [
                    Task(f"{arm}-{candidate}-seed{given.seed}", "candidate", arm, given.seed, candidate)
                    for candidate in given.candidates
                ]
        return tasks + [Task(f"{arm}-seed{seed}", "run", arm, seed) for seed in study.seeds for arm in study.arms]

    @property
    def first(self) -> int:
        """How many tasks come before the counted runs, which may depend on them."""
        return sum(task.kind != "run" for task in self.tasks)

    def folder_of(self, task: Task) -> Path:
        return self.folder / task.name

    def config(self, task: Task, chosen: str = "") -> RunConfig:
        """The configuration of a task. chosen: the variant of an arm that has several.

        Raises ConfigError naming the arm.
        """
        study = self.study
        own = [f"name={task.name}", f"runs_dir={self.folder}", "eval.teacher=false", "resume=false", "resume_step=0"]
        if task.kind == "teacher":
            config = apply_overrides(study.base, [*own, f"student.path={study.base.teacher.path}"])
            validate(config)
            return config
        given, candidate = study.arms[task.arm], task.candidate or chosen
        overrides = given.candidates[candidate] if isinstance(given, Tuned) else given
        who = f"arm {task.arm}" + (f" {candidate}" if candidate else "")
        for override in overrides:
            key = override.partition("=")[0]
            if key in OWN_KEYS:
                raise ConfigError(f"{who}: {override}: a study sets {key} itself; leave it out")
        try:
            config = apply_overrides(
                study.base, [f"train.steps={study.steps}", *overrides, *own, f"train.seed={task.seed}"]
            )
            # Only the evaluation of a run on traces needs its student.
            export = replace(config.checkpoint, export_hf=not config.generates)
            config = replace(config, checkpoint=export)
            validate(config)
            self._check_comparable(config)
        except ConfigError as error:
            raise ConfigError(f"{who}: {error}") from None
        return config

    def _check_comparable(self, config: RunConfig) -> None:
        """Raise ConfigError if a run is evaluated otherwise than the base, or has no traces."""
        base = self.study.base
        for key in ("eval.samples", "eval.sampling", "data.eval_source", "data.eval_size", "data.seed"):
            if attrgetter(key)(config) != attrgetter(key)(base):
                raise ConfigError(f"{key} is not the base's, so results could not be compared; leave it out")
        if config.sft.traces and not Path(config.sft.traces).exists():
            raise ConfigError(f"sft.traces={config.sft.traces}: no such file; make it with `rlad generate`")


def load_study(name: str) -> StudyPlan:
    """The study of a function in `studies/NAME.py`, or in another .py file.

    Raises:
        ConfigError: no such study; a seed given twice, or tuned with and counted; a baseline that is no arm; an
            arm with an unknown key or a wrong value.
    """
    plan = StudyPlan(Path(name).stem, call_file("study", name, _studies_dir(), Study))
    try:
        _check(plan)
    except ConfigError as error:
        raise ConfigError(f"study {plan.name}: {error}") from None
    return plan


def study_names() -> list[str]:
    """Studies that can be given by name."""
    return function_names(_studies_dir())


def _studies_dir() -> Path:
    import studies

    return Path(next(iter(studies.__path__)))


def _check(plan: StudyPlan) -> None:
    study = plan.study
    if not study.arms or not study.seeds:
        raise ConfigError("a study needs at least one arm and one seed")
    if (twice := _first_twice(study.seeds)) is not None:
        raise ConfigError(f"seeds={list(study.seeds)} has {twice} twice; give each seed once")
    for baseline in study.baselines:
        if baseline not in study.arms:
            raise ConfigError(f"baselines: {baseline!r} is no arm; use some of: {', '.join(study.arms)}")
    for arm, given in study.arms.items():
        if isinstance(given, Tuned) and given.seed in study.seeds:
            raise ConfigError(f"arm {arm}: tuned with seed {given.seed}, which counts; use a seed that is not in seeds")
        if isinstance(given, Tuned) and len(given.candidates) < 2:
            raise ConfigError(f"arm {arm}: {len(given.candidates)} variants to choose from; give two or more")
    if (twice := _first_twice([task.name for task in plan.tasks])) is not None:
        raise ConfigError(f"two runs would share the folder {twice}; rename an arm")
    tuned = [arm for arm, given in study.arms.items() if isinstance(given, Tuned)]
    for task in plan.tasks:
        if task.arm not in tuned or task.kind == "candidate":
            plan.config(task)


def _first_twice(values: Sequence[object]) -> object:
    return next((value for value in values if list(values).count(value) > 1), None)
