"""Studies: what they refuse, in which order tasks run and go on. No run is started."""

import re
import signal
from pathlib import Path

import pytest
from study_runs import FIELDS, IMPORTS, KDRL, SFT, TUNED, Rlad, make_plan, run_all, write_run

from rlad_megatron import cli
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import ConfigError, TrainingError
from rlad_megatron.launch.study import Commands, run_study
from rlad_megatron.study import Study, Tuned
from rlad_megatron.study.definition import StudyPlan, load_study, study_names
from rlad_megatron.study.progress import FAILED, FINISHED, OUTPUT, TASK_CONFIG, check_all, state_of, task_config
from rlad_megatron.study.runner import Stopped
from rlad_megatron.trainer.run_state import LATEST


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
        (
            {"arms": {"a": (*SFT, "sft.traces=gone.jsonl")}, "baselines": ()},
            "arm a: sft.traces=gone.jsonl: no such file",
        ),
        ({"arms": {"a": ("eval.samples=2",)}, "baselines": ()}, "arm a: eval.samples is not the base's"),
        ({"arms": {"a": ("data.eval_size=8",)}, "baselines": ()}, "arm a: data.eval_size is not the base's"),
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


def test_a_finished_run_is_marked_before_its_checkpoints_go(tmp_path, monkeypatch):
    """Without them it would begin again."""
    plan, rlad = make_plan(tmp_path), Rlad()

    def killed(folder, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        run_all(plan, rlad)
    assert state_of(plan, plan.tasks[0]) == "finished"


def test_a_stop_between_two_commands_of_a_task_starts_no_other(tmp_path):
    plan, rlad = make_plan(tmp_path, arms={"sft": SFT}, seeds=(4,), baselines=()), Rlad()
    with pytest.raises(Stopped):
        run_all(plan, rlad, lambda: len(rlad.calls) == 2)
    assert [verb for _, verb, _ in rlad.calls] == ["evaluate", "sft"]
    with pytest.raises(Stopped):
        run_all(plan, rlad, lambda: len(rlad.calls) == 4)
    assert state_of(plan, plan.tasks[1]) == "finished", "it was, before the stop"


def test_a_failure_is_that_of_the_last_start(tmp_path):
    plan, rlad = make_plan(tmp_path), Rlad(fails=["trrd-seed1"])
    run_all(plan, rlad)

    def dies(arguments, output):
        with output.open("a") as log:
            log.write("Killed\n")
        return 137

    run_all(plan, dies)
    assert state_of(plan, plan.tasks[1]) == "failed: rlad train ended with code 137: Killed"


def test_a_mapping_that_only_one_configuration_has_is_a_difference(tmp_path):
    own = [f"runs_dir={tmp_path}", "data.source=x.jsonl", "data.reward=math"]
    without, given = (
        StudyPlan("tiny", Study(load_run("kk_tiny_cpu", [*own, *more]), **FIELDS))
        for more in ([], ["data.columns.prompt=question"])
    )
    run_all(without, Rlad())
    with pytest.raises(ConfigError, match='data.columns={} there, {"prompt": "question"} in the study'):
        check_all(given)


def test_a_report_of_another_configuration_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for steps in (2, 3):
        body = f"Study(load_run('kk_tiny_cpu', []), **{FIELDS | {'steps': steps}!r})"
        (tmp_path / "tiny.py").write_text(f"{IMPORTS}def tiny():\n    return {body}\n")
        if steps == 2:
            run_all(load_study("tiny.py"), Rlad())
        assert cli.main(["study", "tiny.py", "--report"]) == (2 if steps == 3 else 0)
    assert "train.steps=2 there, 3 in the study" in capsys.readouterr().err
