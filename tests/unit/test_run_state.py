"""What a start finds in its run folder: nothing, an earlier run, a complete run, or no place for one."""

import os

import pytest

from rlad_megatron.cli import main
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import ConfigError, RunComplete
from rlad_megatron.launch import slurm
from rlad_megatron.observe.report import write_report
from rlad_megatron.trainer.run_state import check_run_dir

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "1"}


@pytest.fixture
def run(tmp_path):
    """The words that resume a run at step 22 of 22."""
    checkpoints = tmp_path / "short" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("22")
    (tmp_path / "short" / "config.yaml").touch()
    return ["eval.teacher=false", f"runs_dir={tmp_path}", "name=short", "train.steps=22", "resume=true"]


def config(words, *more):
    return load_run("kk_tiny_cpu", [*words, *more])


def test_only_a_run_with_its_report_is_complete(run, tmp_path):
    check_run_dir(config(run))  # killed before its export
    report = write_report(config(run), [])
    with pytest.raises(RunComplete, match="short is complete at step 22; to train on, raise train.steps"):
        check_run_dir(config(run))
    check_run_dir(config(run, "train.steps=23"))
    with pytest.raises(ConfigError, match="train.steps=10, but .*short is at step 22; use more than 22"):
        check_run_dir(config(run, "train.steps=10"))
    written = (tmp_path / "short" / "checkpoints" / "latest").stat().st_mtime
    os.utime(report, (written - 1, written - 1))  # of an end before more steps were asked for
    check_run_dir(config(run))


@pytest.mark.parametrize(
    ("verb", "words"), [("train", []), ("sft", ["objective.name=cross_entropy", "data.train_size=64"])]
)
def test_resuming_a_complete_run_starts_nothing_and_succeeds(run, verb, words, monkeypatch, capsys):
    monkeypatch.setattr("rlad_megatron.launch.local.run_local", lambda *_: pytest.fail("started"))
    write_report(config(run), [])
    assert main([verb, "kk_tiny_cpu", *run, *words]) == 0
    assert capsys.readouterr().err.endswith("short is complete at step 22; to train on, raise train.steps\n")
    assert main([verb, "kk_tiny_cpu", *run, *words, "train.steps=10"]) == 2


def test_a_complete_job_that_is_requeued_succeeds(run, tmp_path, monkeypatch, capsys):
    write_report(config(run), [])
    monkeypatch.setattr(os, "environ", os.environ | JOB)
    assert slurm.main(["place", "kk_tiny_cpu", *run]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "is complete at step 22" in err
    monkeypatch.setattr(slurm, "train", lambda job: check_run_dir(job.config))  # NeMo-Run's jobs have no place
    (tmp_path / "short" / "logs" / "job_7_1").mkdir(parents=True)
    failed = tmp_path / "short" / "logs" / "job_7_1" / slurm.FAILED_FILE  # which ends the job
    assert slurm.main(["train", "kk_tiny_cpu", *run]) == 0 and not failed.exists()
    assert slurm.main(["train", "kk_tiny_cpu", *run, "train.steps=10"]) == 2 and failed.exists()


@pytest.mark.parametrize("place", ["/proc/x", "file", "run is a file"])
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_folder_that_cannot_be_is_refused(verb, place, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    runs, name = {"/proc/x": (place, "x"), "file": (file, "x"), "run is a file": (tmp_path, "file")}[place]
    assert main([verb, "kk_tiny_cpu", f"runs_dir={runs}", f"name={name}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"rlad: runs_dir={runs}, name={name}: " in said
    assert [file] == list(tmp_path.iterdir())
