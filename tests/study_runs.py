"""A small study, and what its runs leave, for tests that start none."""

import json

from rlad_megatron.config.recipe import load_run
from rlad_megatron.observe.metrics import METRICS_FILE
from rlad_megatron.study import Study, Tuned
from rlad_megatron.study.definition import StudyPlan
from rlad_megatron.study.progress import EVALUATION, TASK_CONFIG
from rlad_megatron.study.runner import run_tasks
from rlad_megatron.trainer.run_state import CONFIG

IMPORTS = "from rlad_megatron.config.recipe import load_run\nfrom rlad_megatron.study import Study, Tuned\n"
FIELDS = {
    "arms": {"trrd": ("objective.alpha=0.3",), "grpo": ("objective.name=grpo",)},
    "seeds": (1, 2),
    "steps": 2,
    "baselines": ("grpo",),
}
KDRL = ("objective.name=kdrl",)
SFT = ("objective.name=cross_entropy", "objective.aggregation=token_mean")
TUNED = Tuned({"low": (*KDRL, "objective.kl_coefficient=0.001"), "high": (*KDRL, "objective.kl_coefficient=0.1")}, 0)


def make_plan(tmp_path, **fields):
    base = load_run("kk_tiny_cpu", [f"runs_dir={tmp_path}"])
    return StudyPlan("tiny", Study(base, **FIELDS | fields))


def write_run(folder, accuracies, seconds=2.0):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": step, "eval/accuracy": value} for step, value in enumerate(accuracies)]
    work = {"time/step": seconds, "tokens/rollout": 100.0, "tokens/train": 80.0, "reward/mean": 1.0}
    lines = [line | (work if line["step"] else {}) for line in lines]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


class Rlad:
    """Stands in for the command: leaves what a run leaves."""

    def __init__(self, fails=(), accuracies=None):
        self.calls, self.fails, self.accuracies = [], list(fails), accuracies or {}

    def __call__(self, arguments, output):
        folder = output.parent
        assert (folder / TASK_CONFIG).exists() and arguments[1] == str(folder / TASK_CONFIG)
        self.calls.append((folder.name, arguments[0], "resume=true" in arguments))
        if arguments[0] != "evaluate":
            (folder / CONFIG).write_text((folder / TASK_CONFIG).read_text())
            (folder / "checkpoints").mkdir(exist_ok=True)
        if folder.name in self.fails:
            self.fails.remove(folder.name)
            output.write_text("noise\nrlad: student.path: not found\nmore noise\n")
            return 2
        accuracy = self.accuracies.get(folder.name, 0.5)
        if arguments[0] == "train":
            write_run(folder, [0.25, accuracy])
        elif arguments[0] == "evaluate":
            (folder / EVALUATION).write_text(json.dumps({"eval/accuracy": accuracy}))
        return 0


def run_all(plan, rlad, stopped=lambda: False):
    return run_tasks(plan, plan.tasks, rlad, stopped)
