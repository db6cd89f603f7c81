"""Studies: what they refuse, in which order tasks run and go on, and what the pages say. No run is started."""

import json
import random
import re
import signal
from pathlib import Path
from statistics import fmean

import pytest

from rlad_megatron import cli
from rlad_megatron.config.recipe import load_run, to_yaml
from rlad_megatron.errors import ConfigError, TrainingError
from rlad_megatron.launch.study import Commands, run_study
from rlad_megatron.observe.metrics import METRICS_FILE
from rlad_megatron.study import Study, Tuned
from rlad_megatron.study.definition import StudyPlan, load_study, study_names
from rlad_megatron.study.page import markdown
from rlad_megatron.study.progress import (
    EVALUATION,
    FAILED,
    FINISHED,
    OUTPUT,
    TASK_CONFIG,
    check_all,
    state_of,
    task_config,
)
from rlad_megatron.study.results import RESULTS, run_comparison
from rlad_megatron.study.runner import Stopped, run_tasks
from rlad_megatron.study.summary import Comparison, area, interval, run_figures, summarise
from rlad_megatron.trainer.run_state import CONFIG, LATEST

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


def test_all_arms_of_a_seed_come_before_the_next_seed(tmp_path):
    plan, rlad = make_plan(tmp_path), Rlad()
    assert run_all(plan, rlad) == 0
    runs = [(f"{arm}-seed{seed}", "train", False) for seed in (1, 2) for arm in ("trrd", "grpo")]
    assert rlad.calls == [("teacher", "evaluate", False), *runs]
    assert not (plan.folder / "trrd-seed1" / "checkpoints").exists()
    config = task_config(plan, plan.tasks[3])
    assert (config.train.seed, config.train.steps, config.name) == (2, 2, "trrd-seed2")
    assert config.objective.alpha == 0.3 and not config.eval.teacher and not config.checkpoint.export_hf
    assert run_all(plan, rlad) == 0 and len(rlad.calls) == 5, "a finished run was repeated"


def test_a_failure_is_recorded_and_its_run_goes_on_later(tmp_path, capsys):
    plan, rlad = make_plan(tmp_path), Rlad(fails=["grpo-seed1"])
    assert run_all(plan, rlad) == 1 and len(rlad.calls) == 5
    failed = plan.tasks[2]
    assert state_of(plan, failed) == "failed: rlad train ended with code 2: student.path: not found"
    assert "failed: rlad train" in capsys.readouterr().out
    assert run_all(plan, rlad) == 0 and rlad.calls[5:] == [("grpo-seed1", "train", True)]
    assert state_of(plan, failed) == "finished" and not (plan.folder_of(failed) / FAILED).exists()


def test_what_was_stopped_is_no_failure_and_goes_on(tmp_path):
    plan, rlad = make_plan(tmp_path), Rlad(fails=["trrd-seed1"])
    with pytest.raises(Stopped):
        run_all(plan, rlad, lambda: len(rlad.calls) == 2)
    folder = plan.folder / "trrd-seed1"
    assert not (folder / FAILED).exists() and not (folder / FINISHED).exists()
    write_run(folder, [0.1])
    assert state_of(plan, plan.tasks[1]) == "stopped after step 0"
    run_all(plan, rlad)
    assert rlad.calls[2] == ("trrd-seed1", "train", True)


def test_a_student_of_traces_is_evaluated_by_itself(tmp_path):
    plan, rlad = make_plan(tmp_path, arms={"sft": SFT, "grpo": FIELDS["arms"]["grpo"]}, seeds=(4,)), Rlad()
    run_all(plan, rlad)
    assert [call[:2] for call in rlad.calls[1:3]] == [("sft-seed4", "sft"), ("sft-seed4", "evaluate")]
    assert task_config(plan, plan.tasks[1]).checkpoint.export_hf


def test_the_best_variant_by_its_own_seed_goes_on(tmp_path):
    arms = {"kdrl": TUNED, "grpo": FIELDS["arms"]["grpo"]}
    plan, rlad = make_plan(tmp_path, arms=arms), Rlad(["kdrl-high-seed0"], {"kdrl-high-seed0": 0.7})
    assert plan.first == 3
    assert run_all(plan, rlad) == 3, "the runs of an arm without a choice fail too"
    assert "no variant is chosen yet" in state_of(plan, plan.tasks[3])
    assert [name for name, *_ in rlad.calls if "seed1" in name or "seed2" in name] == ["grpo-seed1", "grpo-seed2"]
    assert run_all(plan, rlad) == 0
    config = task_config(plan, plan.tasks[3])
    assert (config.objective.kl_coefficient, config.train.seed) == (0.1, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": (1, 0, 0)}, "seeds=.1, 0, 0. has 0 twice; give each seed once"),
        ({"arms": {"a": ("objective.alhpa=1",)}, "baselines": ()}, "arm a: .*'objective.alhpa'; did you mean 'objec"),
        ({"arms": {"a": ("objective.alpha=2",)}, "baselines": ()}, "arm a: objective.alpha=2 is outside"),
        ({"arms": {"a": ("rollout.group_size=1",)}, "baselines": ()}, "arm a: rollout.group_size=1 gives no"),
        ({"arms": {"a": ("train.seed=3",)}, "baselines": ()}, "arm a: train.seed=3: a study sets train.seed itself"),
        ({"arms": {"a": TUNED}, "seeds": (0, 1), "baselines": ()}, "arm a: tuned with seed 0, which counts"),
        ({"arms": {"a": Tuned({"x": KDRL}, 0)}, "baselines": ()}, "arm a: 1 variants to choose from"),
        ({"arms": {"a": TUNED, "a-low": KDRL}, "seeds": (1,), "baselines": ("b",)}, "'b' is no arm; use some of: a,"),
        ({"arms": {"a": Tuned({"x": ("no=1",), "y": KDRL}, 0)}, "baselines": ()}, "arm a x: unknown key 'no'"),
        ({"arms": {}}, "at least one arm and one seed"),
    ],
)
def test_a_wrong_study_is_one_line(tmp_path, monkeypatch, capsys, fields, message):
    """Before anything runs."""
    body = f"Study(load_run('kk_tiny_cpu', []), **{FIELDS | fields!r})"
    (tmp_path / "tiny.py").write_text(f"{IMPORTS}def tiny():\n    return {body}\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", "tiny.py"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("rlad: study tiny: ") and re.search(message, said), said
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.py"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "Study(load_run('kk_tiny_cpu', []), {'a b': ()}, (1,), 2, ())",
            "rlad: tiny.py: Study.argument 2.a b.* should match pattern",
        ),
        (
            "Study(load_run('kk_tiny_cpu', []), {'a': ()}, (1,), steps=0, baselines=())",
            "rlad: tiny.py: Study.steps=0: .* greater than or equal to 1",
        ),
        ("load_run('kk_tiny_cpu', [])", "rlad: tiny.py: tiny.. returns RunConfig.*; a study returns a Study"),
    ],
)
def test_what_is_no_study_is_one_line(tmp_path, monkeypatch, capsys, body, message):
    (tmp_path / "tiny.py").write_text(f"{IMPORTS}def tiny():\n    return {body}\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", "tiny.py"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and re.search(message, said), said


def test_results_of_another_configuration_are_refused(tmp_path):
    plan, rlad = make_plan(tmp_path), Rlad()
    run_all(plan, rlad)
    with pytest.raises(ConfigError, match=r"trrd-seed1 holds .*: train.steps=2 there, 3 in the study; remove "):
        check_all(make_plan(tmp_path, steps=3))
    (plan.folder / "trrd-seed1" / FINISHED).unlink()
    with pytest.raises(ConfigError, match="train.steps=2 there"):
        check_all(make_plan(tmp_path, steps=3))
    (plan.folder / "trrd-seed1" / TASK_CONFIG).unlink()
    with pytest.raises(ConfigError, match="a run that is not of this study"):
        check_all(plan)


def fake_main(arguments):
    print("line of", *arguments)
    return 7


def stopped_main(arguments):
    """Is told to stop, after a step or before."""
    folder = Path(arguments[1]).parent
    if folder.name == "trrd-seed1":
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / LATEST).write_text("1")
    (folder.parent / "stop").touch()
    signal.pause()


def test_a_command_is_a_process_with_its_output_in_a_file(tmp_path):
    commands = Commands(fake_main, tmp_path / "stop")
    assert commands.run(["train", "x"], tmp_path / OUTPUT) == 7 and not commands.stopped
    assert (tmp_path / OUTPUT).read_text() == "line of train x\n"


def test_a_task_that_is_told_to_stop_has_saved_a_step_or_says_so(tmp_path):
    plan = make_plan(tmp_path)
    stop = plan.folder / "stop"
    assert run_study(plan, 1, stopped_main, stop) == 143
    stop.unlink()
    with pytest.raises(TrainingError, match="grpo, seed 1: told to stop before a step was saved; give the job more"):
        run_study(plan, 2, stopped_main, stop)
    assert not (plan.folder / "trrd-seed1" / FAILED).exists()
    with pytest.raises(ConfigError, match="--task 5: study tiny has the tasks 0 to 4"):
        run_study(plan, 5, stopped_main)


def test_each_study_is_valid():
    for name in study_names():
        assert load_study(name).tasks


# ---------------------------------------------------------------- figures


def test_the_interval_is_students_t():
    found = interval([0.1, 0.2, 0.6])
    # mean 0.3, sample std sqrt(0.07); t(0.975, 2) = 4.302653
    half = 4.302653 * (0.07 / 3) ** 0.5
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.3, 0.3 - half, 0.3 + half))
    assert interval([0.1, 0.2]) == {"mean": pytest.approx(0.15), "low": None, "high": None, "n": 2}


def synthetic(generator, arms, seeds, prompts=128):
    """Runs of arms that are the same: each has its own noise of training, and that of its evaluation."""
    runs = {}
    for arm in arms:
        runs[arm] = {}
        for seed in range(seeds):
            skill = min(max(generator.gauss(0.7, 0.03), 0.0), 1.0)
            final = sum(generator.random() < skill for _ in range(prompts)) / prompts
            runs[arm][seed] = [{"step": 0, "eval/accuracy": 0.3}, {"step": 5, "eval/accuracy": final}]
    return Comparison("same", runs, ("a",))


@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_arms_differ_about_once_in_twenty(seeds):
    """The bar is 18 of 20 repeats. Over 400 repeats an honest interval excludes 0 in 20 +- 5."""
    generator = random.Random(seeds)
    found = []
    for _ in range(400):
        row = summarise(synthetic(generator, "ab", seeds))["differences"][0]
        assert row["figure"] == "accuracy" and row["n"] == seeds
        found.append(row["excludes_0"])
    assert 0.02 < fmean(found) < 0.08  # by the normal quantile it would be 0.12 or more
    assert sum(found[:20]) <= 2


def test_a_real_difference_is_resolved():
    runs = {"a": [0.70, 0.71, 0.69], "b": [0.80, 0.82, 0.79]}
    arms = {arm: {i: [{"step": 1, "eval/accuracy": value}] for i, value in enumerate(runs[arm])} for arm in runs}
    (row,) = summarise(Comparison("two", arms, ("a",)))["differences"]
    assert row["excludes_0"] and row["mean"] == pytest.approx(fmean([0.10, 0.11, 0.10])) and row["n"] == 3


def test_figures_of_a_run_by_hand():
    metrics = [
        {"step": 0, "eval/accuracy": 0.2},
        {"step": 2, "eval/accuracy": 0.4, "time/step": 3.0, "tokens/rollout": 10.0},
        {"step": 3, "time/step": 4.0, "tokens/rollout": 20.0},
        {"step": 6, "eval/accuracy": 0.8, "eval/pass@2": 0.9, "time/step": float("nan")},
    ]
    # (2 * 0.3 + 4 * 0.6) / 6
    assert area(metrics) == pytest.approx(0.5) and area(metrics[3:]) is None
    figures = run_figures([*metrics[:3], metrics[3] | {"time/step": 1.0}])
    assert figures == {
        "accuracy": 0.8,
        "area": pytest.approx(0.5),
        "pass@2": 0.9,
        "seconds": 8.0,
        "tokens_rollout": 30.0,
    }


# ---------------------------------------------------------------- pages


def test_the_report_of_a_study_says_what_was_run_and_what_not(tmp_path, monkeypatch, capsys):
    """Two arms and two seeds whose runs are written here; one has failed."""
    monkeypatch.chdir(tmp_path)
    plan = make_plan(tmp_path / "runs", arms=FIELDS["arms"] | {"kdrl": TUNED})
    values = {"trrd-seed1": 0.75, "trrd-seed2": 0.5, "grpo-seed1": 0.5, "grpo-seed2": 0.5, "teacher": 0.875}
    run_all(plan, Rlad(["grpo-seed2", "kdrl-low-seed0", "kdrl-high-seed0"], values))
    capsys.readouterr()
    fields = ", ".join(f"{name}={value!r}" for name, value in vars(plan.study).items() if name != "base")
    body = f"Study(load_run('kk_tiny_cpu', ['runs_dir={tmp_path / 'runs'}']), {fields})"
    (tmp_path / "tiny.py").write_text(f"{IMPORTS}def tiny():\n    return {body}\n")
    assert cli.main(["study", "tiny.py", "--report"]) == 0
    assert capsys.readouterr().out == "report: studies/results/tiny/report.html\n"
    summary = json.loads((RESULTS / "tiny" / "summary.json").read_text())
    assert summary["arms"]["trrd"]["accuracy"] == {"mean": 0.625, "low": None, "high": None, "n": 2}
    assert summary["arms"]["trrd"]["seconds"]["mean"] == 2 and summary["teacher"] == {"eval/accuracy": 0.875}
    row = next(row for row in summary["differences"] if (row["arm"], row["figure"]) == ("trrd", "accuracy"))
    assert (row["seeds"], row["by_seed"], row["excludes_0"]) == ([1], [0.25], False)
    missing = {row["task"]: row["why"] for row in summary["not_run"]}
    assert set(missing) == {f"kdrl {name}, seed 0" for name in ("low", "high")} | {
        "grpo, seed 2",
        "kdrl, seed 1",
        "kdrl, seed 2",
    }
    text = (RESULTS / "tiny" / "summary.md").read_text()
    assert "| trrd | 2 | 0.625 |" in text and "| teacher |  | 0.875 |" in text and "grpo, seed 2: failed: " in text
    page = (RESULTS / "tiny" / "report.html").read_text()
    assert page.count("<svg") == 4 and "grpo, seed 2: failed: " in page and "nothing is chosen yet" in page
    assert "http" not in re.sub(r'(xmlns(:xlink)?|DOCTYPE.*?)="http[^"]*"', "", page), "it needs the network"


def make_run(folder, seed, accuracies, *overrides):
    config = load_run(
        "kk_tiny_cpu", [f"runs_dir={folder.parent}", f"name={folder.name}", f"train.seed={seed}", *overrides]
    )
    write_run(folder, accuracies)
    (folder / CONFIG).write_text(to_yaml(config))
    return str(folder)


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path, capsys):
    runs = [make_run(tmp_path / f"a{seed}", seed, [0.2, 0.5 * seed]) for seed in (1, 2)]
    runs += [make_run(tmp_path / f"b{seed}", seed, [0.2, 0.75], "objective.alpha=0.25") for seed in (2, 1)]
    page = tmp_path / "pages" / "x.html"
    assert cli.main(["compare", *runs, "--output", str(page)]) == 0 and page.read_text().count("<svg") == 4
    comparison = run_comparison([tmp_path / name for name in ("a1", "a2", "b2", "b1")])
    assert {arm: list(seeds) for arm, seeds in comparison.arms.items()} == {
        "objective.alpha=0.5": [1, 2],
        "objective.alpha=0.25": [2, 1],
    }
    row = summarise(comparison)["differences"][0]
    assert (row["arm"], row["by_seed"]) == ("objective.alpha=0.25", [-0.25, 0.25])
    again = make_run(tmp_path / "again", 1, [0.2, 0.5])
    capsys.readouterr()
    assert cli.main(["compare", *runs, again]) == 2
    assert re.fullmatch(r"rlad: \S+a1 and \S+again have the same .* train.seed=1; leave .*\n", capsys.readouterr().err)
    assert cli.main(["compare", str(tmp_path)]) == 2
    assert f"rlad: {tmp_path}: no config.yaml; give run folders" in capsys.readouterr().err


def test_a_page_shows_text_as_text():
    arms = {"a<b": {1: [{"step": 1, "eval/accuracy": 0.5}]}, "x|y": {1: [{"step": 1, "eval/accuracy": 0.25}]}}
    text = markdown(summarise(Comparison("t", arms, ("x|y",))))
    assert "| a<b | x\\|y | accuracy | +0.250 |  | 1 |  |" in text
