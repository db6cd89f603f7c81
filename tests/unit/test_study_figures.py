"""Studies and comparisons: their figures, and what the pages say."""

import json
import random
import re
from statistics import fmean

import pytest
from study_runs import FIELDS, IMPORTS, TUNED, Rlad, make_plan, run_all, write_run

from rlad_megatron import cli
from rlad_megatron.config.recipe import load_run, to_yaml
from rlad_megatron.study.page import markdown
from rlad_megatron.study.results import RESULTS, run_comparison
from rlad_megatron.study.summary import Comparison, area, interval, run_figures, summarise
from rlad_megatron.trainer.run_state import CONFIG


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
    assert run_figures(metrics)["seconds"] == 7.0, "a figure that is no number is left out"
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


def test_unequal_training_and_unequal_teachers_are_said(tmp_path):
    long, short = (
        make_run(tmp_path / "a", 1, [0.2, 0.5, 0.6]),
        make_run(tmp_path / "b", 1, [0.2, 0.5], "data.template=$x{$ {prompt}"),
    )
    page = tmp_path / "x.html"
    assert cli.main(["compare", long, short, "--output", str(page)]) == 0
    assert "the last evaluations are at steps 1, 2: differences compare unequal training" in page.read_text()
    for folder, teacher in ((long, 0.9), (short, 0.8)):
        with open(f"{folder}/metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 9, "eval/teacher_accuracy": teacher}) + "\n")
    assert run_comparison([tmp_path / "a"]).teacher == {"eval/accuracy": 0.9}
    assert run_comparison([tmp_path / "a", tmp_path / "b"]).teacher == {}
