"""What a start finds in its run folder: nothing, an earlier run, a complete run, or no place for one."""

import json
import os

import pytest

from rlad_megatron.cli import main
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import CheckpointError, ConfigError, RunComplete
from rlad_megatron.launch import slurm
from rlad_megatron.models.checkpoint_files import DIGESTS, digests_of, write_digests
from rlad_megatron.observe.report import write_report
from rlad_megatron.trainer.run_state import META, check_resumable, check_run_dir, find_checkpoint, read_meta, steps_in

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
    report = write_report(config(run))
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
    write_report(config(run))
    assert main([verb, "kk_tiny_cpu", *run, *words]) == 0
    assert capsys.readouterr().err.endswith("short is complete at step 22; to train on, raise train.steps\n")
    assert main([verb, "kk_tiny_cpu", *run, *words, "train.steps=10"]) == 2


def test_a_complete_job_that_is_requeued_succeeds(run, tmp_path, monkeypatch, capsys):
    write_report(config(run))
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


@pytest.fixture
def checkpoints(tmp_path):
    """Those of steps 2, 4 and 6, with digests, and `latest`."""
    for step in (2, 4, 6):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        (folder / "weights").write_text(f"weights {step}")
        (folder / META).write_text(json.dumps({"model": "m", "layout": [1, 1], "loop": {"step": step, "verb": "sft"}}))
        write_digests(folder, digests_of(folder, ["weights", META]))
    (tmp_path / "step_00000008.tmp").mkdir()  # killed while it was written
    (tmp_path / "step_00000009.abandoned1").mkdir()
    (tmp_path / "latest").write_text("4")
    return tmp_path


def test_a_resume_takes_the_step_it_is_given_or_the_latest(checkpoints):
    assert find_checkpoint(checkpoints).name == "step_00000004"
    assert find_checkpoint(checkpoints, 2).name == "step_00000002"
    assert find_checkpoint(checkpoints / "none") is None


@pytest.mark.parametrize("latest", [None, "", "four", b"\xff"])
def test_without_latest_the_newest_sound_checkpoint_is_taken(checkpoints, latest):
    if latest is None:
        (checkpoints / "latest").unlink()
    else:
        (checkpoints / "latest").write_bytes(latest if isinstance(latest, bytes) else latest.encode())
    assert find_checkpoint(checkpoints).name == "step_00000006"
    (checkpoints / "step_00000006" / "weights").write_text("weights 7")
    assert find_checkpoint(checkpoints).name == "step_00000004"
    (checkpoints / "step_00000004" / META).unlink()
    assert find_checkpoint(checkpoints).name == "step_00000002"
    (checkpoints / "step_00000002" / "weights").write_text("")
    with pytest.raises(CheckpointError, match="step_00000006/weights: damaged.*no checkpoint in .* is sound"):
        find_checkpoint(checkpoints)


def test_a_checkpoint_without_its_digests_is_damaged_unless_it_is_an_old_one(checkpoints):
    latest = checkpoints / "step_00000006"
    (latest / DIGESTS).unlink()
    (checkpoints / "latest").unlink()
    assert find_checkpoint(checkpoints) == latest
    meta = json.loads((latest / META).read_text())
    (latest / META).write_text(json.dumps(meta | {"run": "a"}))
    assert find_checkpoint(checkpoints).name == "step_00000004"
    said = f"{latest / DIGESTS}: not found, though the checkpoint was written with it; .* resume_step=4$"
    with pytest.raises(CheckpointError, match=said):
        check_resumable(latest, "m", "sft")


def test_other_names_are_no_steps(tmp_path):
    for name in ("step_00000004", "step_²", "step_", "step_4.tmp"):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [4]


def test_what_is_missing_or_damaged_is_named_with_what_to_resume_from(checkpoints):
    with pytest.raises(CheckpointError, match="step_00000003: not found, but resume_step=3 names it; .*resume_step=6$"):
        find_checkpoint(checkpoints, 3)
    (checkpoints / "latest").write_text("7")
    with pytest.raises(CheckpointError, match="step_00000007: not found, but .*latest names it; .* resume_step=6$"):
        find_checkpoint(checkpoints)
    meta = checkpoints / "step_00000006" / META
    for content in ("", meta.read_text()[:30], "[]", "null", '{"loop": {}}', '{"loop": {"step": 1, "verb": "sft"}}'):
        meta.write_text(content)
        with pytest.raises(CheckpointError, match="step_00000006/run.json: damaged.* resume_step=4$"):
            check_resumable(checkpoints / "step_00000006", "m", "sft")
    for step in (2, 4):
        (checkpoints / f"step_{step:08d}" / "weights").unlink()
    with pytest.raises(CheckpointError, match="run.json: damaged.*no earlier checkpoint is sound"):
        read_meta(checkpoints / "step_00000006")


def test_a_step_to_resume_from_needs_resume(run, capsys):
    words = [word for word in run if word != "resume=true"]
    assert main(["train", "kk_tiny_cpu", *words, "resume_step=3"]) == 2
    assert capsys.readouterr().err == "rlad: resume_step=3 needs resume=true\n"


def test_a_run_whose_latest_is_gone_is_still_a_run(run, tmp_path):
    (tmp_path / "short" / "config.yaml").unlink()
    (tmp_path / "short" / "checkpoints" / "latest").unlink()
    (tmp_path / "short" / "checkpoints" / "step_00000020").mkdir()
    with pytest.raises(ConfigError, match="holds an earlier run"):
        check_run_dir(config(run, "resume=false"))


def test_a_requeued_job_continues_from_the_latest_whatever_its_first_start_was_told(run):
    job = slurm.Job.from_environment(config(run, "resume_step=7"), JOB)
    assert job.config.resume and job.config.resume_step == 0
    job = slurm.Job.from_environment(config(run, "resume_step=7"), JOB | {"SLURM_RESTART_COUNT": "0"})
    assert job.config.resume_step == 7
