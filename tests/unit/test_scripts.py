"""The scripts in slurm/ without Slurm: what they refuse, what reaches sbatch and srun, and how a job stops.

Also a documented command.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rlad_megatron.config.recipe import load_run, to_yaml
from rlad_megatron.launch.heartbeat import SILENT_S, heartbeat
from rlad_megatron.observe.metrics import METRICS_FILE
from rlad_megatron.trainer.run_state import CONFIG

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "kk_tiny_cpu.sh"
FOLDERS = ("slurm", "tests/slurm", "rlad_megatron/launch")
SCRIPTS = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("*.sh"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (make slurm-deps)")
def test_scripts_pass_shellcheck():
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def submit(tmp_path, *arguments, script=SCRIPT, sbatch=True, job="", then="", array="", **site):
    """Run the script with a site file, and an sbatch and srun that only record their arguments.

    then: their next commands. array: the index of a task of the array `job`. Returns the exit code, stderr, and the
    arguments of the last call or None.
    """
    lines = {"RLAD_PYTHON": sys.executable, "RLAD_LOGIN_PYTHON": sys.executable} | site
    (tmp_path / "site.sh").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    path = tmp_path / "bin"
    path.mkdir()
    for program in ("bash", "cat", "date", "env", "grep", "hostname", "mkdir", "mktemp", "rm", "sleep", "touch"):
        (path / program).symlink_to(shutil.which(program))
    for program in ("sbatch", "srun", "scontrol") if sbatch else ():
        (path / program).write_text(f'#!{shutil.which("bash")}\nprintf "%s\\n" "$@" >{tmp_path}/called\n{then}\n')
        (path / program).chmod(stat.S_IRWXU)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"RLAD_SITE": str(tmp_path / "site.sh"), "PATH": str(path), "PYTHONPATH": str(ROOT)}
    environment |= {"SLURM_JOB_ID": job} if job else {}
    environment |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": array} if array else {}
    done = subprocess.run([script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    called = tmp_path / "called"
    return done.returncode, done.stderr, called.read_text().splitlines() if called.exists() else None


def test_what_is_submitted(tmp_path):
    code, said, called = submit(tmp_path, "--time=5", "train.steps=3", "name=x y", "runs_dir=none")
    config = called.pop(2)
    assert (code, said) == (0, "") and called == ["--time=5", str(SCRIPT), "train.steps=3", "name=x y", "runs_dir=none"]
    assert config.startswith("runs/.submitted/x y-") and config.endswith(".yaml")
    frozen = ROOT / config
    try:
        lines = frozen.read_text().splitlines()
        assert "commit" in lines[0]
        assert {"name: x y", "  steps: 3", "  nodes: 1"} <= set(lines)  # the last one by the script
    finally:
        frozen.unlink()


def test_a_submission_that_sbatch_refuses_leaves_nothing(tmp_path):
    code, _, called = submit(tmp_path, "runs_dir=none", "name=refused", then="exit 7")
    assert code == 7 and called[1].startswith("runs/.submitted/refused-") and not (ROOT / called[1]).exists()


def test_without_a_python_on_the_login_node_the_job_makes_the_check(tmp_path):
    assert submit(tmp_path, "train.stpes=3", RLAD_LOGIN_PYTHON="") == (0, "", [str(SCRIPT), "train.stpes=3"])


def test_a_complete_run_is_neither_submitted_nor_started_again(tmp_path):
    checkpoints = tmp_path / "runs" / "done" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("3")
    (tmp_path / "runs" / "done" / "report.html").touch()
    run = [f"runs_dir={tmp_path / 'runs'}", "name=done", "resume=true", "train.steps=3"]
    code, said, called = submit(tmp_path, *run)
    assert (code, called) == (0, None) and "is complete at step 3" in said
    shutil.rmtree(tmp_path / "bin")
    assert submit(tmp_path, *run, job="7", then="echo an image may print a line")[:2] == (0, "")


@pytest.mark.parametrize("frozen", [[], ["runs/.submitted/x y-1.yaml"]])
def test_a_job_takes_its_frozen_configuration_for_its_recipe(tmp_path, frozen):
    _, _, called = submit(tmp_path, *frozen, "train.steps=3", job="7", then="exit 3")
    recipe = (frozen or ["kk_tiny_cpu"])[0]
    assert called[-5:] == ["place", recipe, "rollout.nodes=1", "eval.teacher=false", "train.steps=3"]


@pytest.mark.parametrize(
    ("array", "name"), [({}, "9"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2")]
)
def test_a_task_of_a_job_array_is_named_by_its_index(array, name):
    """SLURM_JOB_ID of its last task is the id of the whole array."""
    environment = os.environ | {"SLURM_JOB_ID": "9"} | array
    command = ["bash", "-c", "set -euo pipefail; source slurm/job.sh; rlad_job_id"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr


STUDY = ROOT / "slurm" / "study.sh"
STOP = "runs/.submitted/stop_7_2"  # of task 2 of the array 7
UNTIL_STOP = f"until [[ -e {STOP} ]]; do sleep 0.05; done"


def test_a_study_is_two_arrays_the_second_after_the_first(tmp_path):
    then = f'printf "%s\\n" "$*" >>{tmp_path}/calls; echo 70'
    code, said, _ = submit(tmp_path, "kk_objectives", "--time=5", script=STUDY, then=then)
    assert (code, said) == (0, "")
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable --array=0-0 --time=5 {STUDY} kk_objectives",
        f"--array=1-12 --dependency=afterany:70 --time=5 {STUDY} kk_objectives",
    ]


def test_an_array_of_ones_own_is_submitted_as_it_is(tmp_path):
    code, _, called = submit(tmp_path, "kk_objectives", "--array=3,7%1", script=STUDY, RLAD_LOGIN_PYTHON="")
    assert code == 0 and called == ["--array=3,7%1", str(STUDY), "kk_objectives"]


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["no_study"], {}, "study 'no_study' not found"),
        (["kk_objectives", "train.steps=3"], {}, "'train.steps=3' is no option of sbatch"),
        (["kk_objectives"], {"RLAD_LOGIN_PYTHON": ""}, "RLAD_LOGIN_PYTHON is empty"),
        (["kk_objectives"], {"sbatch": False}, "no Slurm on this machine"),
        (["kk_objectives"], {"job": "7"}, "no job array: run slurm/study.sh kk_objectives"),
    ],
)
def test_a_study_that_is_refused_is_one_line(tmp_path, arguments, changes, message):
    code, said, called = submit(tmp_path, *arguments, script=STUDY, **changes)
    assert (code, called) == (2, None) and len(said.splitlines()) == 1 and message in said, said


@pytest.mark.parametrize(
    ("then", "code", "requeued"),
    [
        ("", 0, False),
        ("exit 2", 2, False),
        ("exit 143", 143, False),  # cancelled
        (f"kill -USR1 $PPID; {UNTIL_STOP}; exit 143", 0, True),  # `rlad study` sees the file, saves and ends so
        (f"kill -USR1 $PPID; {UNTIL_STOP}; exit 0", 0, False),
    ],
)
def test_one_task_of_a_study_is_requeued_when_it_was_told_to_stop(tmp_path, then, code, requeued):
    """srun is exec'ed by a child of the script, so its parent is the script."""
    then = f'case $0 in *scontrol) echo "$@" >{tmp_path}/requeued; exit;; esac; {then}'
    found, said, called = submit(tmp_path, "kk_objectives", script=STUDY, job="7", array="2", then=then)
    assert (found, said) == (code, "")
    if not requeued:
        assert called[-6:] == ["study", "kk_objectives", "--task", "2", "--stop-file", STOP]
    assert (tmp_path / "requeued").exists() == requeued and not (ROOT / STOP).exists()
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7_2\n"


def test_a_step_in_a_container(tmp_path):
    """pyxis refuses an option that is given twice."""
    site = {"RLAD_CONTAINER_IMAGE": "nvcr.io#nvidia/x:1", "RLAD_CONTAINER_MOUNTS": "/data:/data:ro,/dev/shm:/dev/shm"}
    code, _, called = submit(tmp_path, "name=x y", job="7", then="echo --container-image; exit 3", **site)
    assert code == 3  # of the first step, the placement
    assert [option for option in called if "container" in option] == [
        "--container-image=nvcr.io#nvidia/x:1",
        f"--container-workdir={ROOT}",
        "--container-writable",
        f"--container-mounts={ROOT}:{ROOT},/data:/data:ro,/dev/shm:/dev/shm",
    ]
    assert called[-2:] == ["eval.teacher=false", "name=x y"]


def test_a_container_without_pyxis_is_refused(tmp_path):
    code, said, called = submit(tmp_path, job="7", RLAD_CONTAINER_IMAGE="nvcr.io#nvidia/x:1")
    assert code == 2 and called == ["--help"]
    assert len(said.splitlines()) == 1 and "RLAD_CONTAINER_IMAGE=nvcr.io#nvidia/x:1" in said and "pyxis" in said


@pytest.mark.parametrize(("squeue", "late"), [("return 1", ""), ("echo NONE", ""), ("date +%FT%T", "late\n")])
def test_only_a_limit_that_is_near_makes_a_job_late(tmp_path, squeue, late):
    """If Slurm's controller does not answer, the trainer still gets its time to save."""
    script = f"set -euo pipefail; source slurm/job.sh; squeue() {{ {squeue}; }}; pids=(); rlad_folder=$1"
    end = "wait; if [[ -e $1/failed ]]; then echo late; fi"
    command = ["bash", "-c", f"{script}; rlad_tell_to_stop >/dev/null; {end}", "job", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"SLURM_JOB_ID": "7"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, late), done.stderr
    assert (tmp_path / "stop").exists()
    if late:
        assert "did not end in time (newest checkpoint: none); continue with" in (tmp_path / "failed").read_text()


UNFINISHED = "rlad: a task ended before the run had finished; see the logs of the tasks\n"


@pytest.mark.parametrize(
    ("left", "status", "code", "said", "requeued"),
    [
        ("failed", 2, 2, "rlad: it broke\n", ""),
        ("requeue", 0, 0, "", "requeue 7\n"),
        ("finished", 0, 0, "", ""),
        ("nothing", 0, 1, UNFINISHED, ""),
        ("nothing", 9, 9, UNFINISHED, ""),
    ],
)
@pytest.mark.parametrize("ending", ["rlad_finish $2", "trap 'rlad_finish $?' EXIT; exit $2"], ids=["job.sh", "NeMo"])
def test_how_a_job_ends(tmp_path, left, status, code, said, requeued, ending):
    (tmp_path / left).write_text("it broke\n")
    script = f'set -euo pipefail; source slurm/job.sh; scontrol() {{ echo "$@"; }}; rlad_folder=$1; {ending}'
    command = ["bash", "-c", script, "job", tmp_path, str(status)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"SLURM_JOB_ID": "7"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)
    assert done.stdout.removeprefix("stopped before its end; requeueing\n") == requeued


def test_silent_ranks_are_named_at_the_end_of_a_job(tmp_path):
    for rank, beat in ((0, 1000), (1, 984), (12, 985)):  # what counts is the last beat of all
        with heartbeat(tmp_path, rank, 13, timeout_s=9):
            pass
        os.utime(tmp_path / f"alive_{rank}", (beat, beat))
    assert SILENT_S == 15
    script = "set -euo pipefail; source slurm/job.sh; rlad_folder=$1; rlad_finish 1"
    command = ["bash", "-c", script, "job", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"SLURM_JOB_ID": "7"}, capture_output=True, text=True)
    who = re.escape((tmp_path / "alive_1").read_text())
    assert re.fullmatch(
        rf"rlad: .* logs of the tasks; rank 1 \({who}\) had given no sign of life for 16 s\n", done.stderr
    )


@pytest.mark.parametrize("arguments", [["--help"], ["name=x", "-h"]])
def test_help_is_the_scripts_own(tmp_path, arguments):
    """Works without a site file and without Slurm."""
    environment = os.environ | {"RLAD_SITE": str(tmp_path / "no_site.sh")}
    done = subprocess.run([SCRIPT, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("The demo on a cluster, without a GPU")
    assert (
        "[key=value ...]" in done.stdout and "\nrecipe: kk_tiny_cpu rollout.nodes=1 eval.teacher=false\n" in done.stdout
    )
    assert f"\nsite file: {tmp_path}/no_site.sh " in done.stdout and "goes to sbatch" in done.stdout
    assert "#" not in done.stdout.replace("#SBATCH lines", "") and "set -euo" not in done.stdout


def test_a_login_python_without_the_packages_is_named(tmp_path):
    (tmp_path / "pydantic.py").write_text("import no_such_package")
    python = tmp_path / "python"
    python.write_text(f'#!{shutil.which("bash")}\nPYTHONPATH={tmp_path}:{ROOT} exec {sys.executable} "$@"\n')
    python.chmod(stat.S_IRWXU)
    code, said, called = submit(tmp_path, RLAD_LOGIN_PYTHON=python)
    assert code == 2 and called is None and len(said.splitlines()) == 1, said
    for part in (
        f"rlad: RLAD_LOGIN_PYTHON={python}",
        "'no_such_package'",
        "pydantic and PyYAML",
        "make setup",
        "leave it empty",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("arguments", "changes", "parts"),
    [
        (["train.nodes=2"], {}, ["3 nodes", "job has 2", "--nodes=3"]),
        (["--gpus-per-node=1", "train.gpus_per_node=2"], {}, ["train.gpus_per_node=2", "1 GPUs"]),
        (["-p", "gpu"], {}, ["'gpu' is not key=value", "--partition=gpu"]),
        (["train.stpes=1"], {}, ["did you mean 'train.steps'"]),
        ([], {"RLAD_CONTAINER_IMAGE": "/no/such/image.sqsh"}, ["RLAD_CONTAINER_IMAGE=/no/such/image.sqsh", "no such"]),
        ([], {"RLAD_CONTAINER_IMAGE": "image.sqsh"}, ["RLAD_CONTAINER_IMAGE=image.sqsh", "write ./image.sqsh"]),
        (
            [],
            {"RLAD_CONTAINER_IMAGE": "x:1", "RLAD_PYTHON": ".venv/bin/python"},
            ["RLAD_PYTHON", "/opt/rlad/bin/python"],
        ),
        ([], {"RLAD_PYTHON": "none/python"}, ["RLAD_PYTHON=none/python", "no such program"]),
        ([], {"RLAD_PYTHON": ""}, ["RLAD_PYTHON is not set"]),
        (["rollout.tensor_parallel=3"], {}, ["rollout.tensor_parallel=3", "attention heads"]),
        (["student.layout.tensor_parallel=4", "train.ranks_per_node=4"], {}, ["student.layout.tensor_parallel=4"]),
        (["student.path=recipes/assets/no_such"], {}, ["student.path=recipes/assets/no_such"]),
        (["resume=true", "runs_dir=none"], {}, ["none/kk_tiny_cpu does not exist"]),
        ([], {"RLAD_LOGIN_PYTHON": "/no/such/python"}, ["RLAD_LOGIN_PYTHON=/no/such/python", "make setup"]),
        ([], {"sbatch": False}, ["no Slurm on this machine", "login node", "rlad train"]),
    ],
)
def test_what_is_refused_is_one_line_and_nothing_is_submitted(tmp_path, arguments, changes, parts):
    code, said, called = submit(tmp_path, *arguments, **changes)
    assert code == 2 and called is None, said
    assert len(said.splitlines()) == 1 and said.startswith("rlad: "), said
    for part in parts:
        assert part in said, (part, said)


def test_nothing_waits_for_the_limit_of_a_job_that_has_ended(tmp_path):
    """Output ends when the last process that holds it does. The outer shell reaps the job's, as Slurm does."""
    script = "set -euo pipefail; source slurm/job.sh; squeue() { date --date='1 hour' +%FT%T; }; pids=()"
    command = ["bash", "-c", 'bash -c "$@"; true', "slurm", f"{script}; rlad_folder=$1; rlad_tell_to_stop", "job"]
    environment = os.environ | {"SLURM_JOB_ID": "7"}
    subprocess.run([*command, tmp_path], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert (tmp_path / "stop").exists() and not (tmp_path / "failed").exists()


def test_the_documented_command_writes_a_report_of_an_unfinished_run(tmp_path):
    (command,) = re.findall(r'python -c "([^"]*write_report[^"]*)"', (ROOT / "docs" / "operations.md").read_text())
    run = load_run("kk_tiny_cpu", [f"runs_dir={tmp_path}", "name=NAME"])
    run.run_dir.mkdir()
    (run.run_dir / CONFIG).write_text(to_yaml(run))
    (run.run_dir / METRICS_FILE).write_text('{"step": 0, "eval/accuracy": 0.5}\n')
    code = command.replace("\n    ", "\n").replace("runs/NAME", str(run.run_dir))
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (run.run_dir / "report.html").stat().st_size
