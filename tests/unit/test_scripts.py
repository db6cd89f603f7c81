"""The scripts in slurm/ as a user runs them before there is a job: what is refused, and what reaches sbatch."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "kk_tiny_cpu.sh"
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "tests" / "slurm").glob("*.sh")])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (make slurm-deps)")
def test_scripts_pass_shellcheck():
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def submit(tmp_path, *arguments, sbatch=True, job="", then="", **site):
    """Run the script with a site file and a PATH on which sbatch and srun only note how they were called.

    then: what the two do after that. Returns the exit code, stderr, and the arguments of the last call (None if there
    was none).
    """
    lines = {"RLAD_PYTHON": sys.executable, "RLAD_LOGIN_PYTHON": sys.executable} | site
    (tmp_path / "site.sh").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    path = tmp_path / "bin"
    path.mkdir()
    for program in ("bash", "cat", "env", "grep", "hostname", "mktemp", "rm"):
        (path / program).symlink_to(shutil.which(program))
    for program in ("sbatch", "srun") if sbatch else ():
        (path / program).write_text(f'#!{shutil.which("bash")}\nprintf "%s\\n" "$@" >{tmp_path}/called\n{then}\n')
        (path / program).chmod(stat.S_IRWXU)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"RLAD_SITE": str(tmp_path / "site.sh"), "PATH": str(path), "PYTHONPATH": str(ROOT)}
    environment |= {"SLURM_JOB_ID": job} if job else {}
    done = subprocess.run([SCRIPT, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    called = tmp_path / "called"
    return done.returncode, done.stderr, called.read_text().splitlines() if called.exists() else None


def test_what_is_submitted(tmp_path):
    assert submit(tmp_path, "--time=5", "train.steps=3", "name=x y") == (
        0,
        "",
        ["--time=5", str(SCRIPT), "train.steps=3", "name=x y"],
    )


def test_a_step_in_a_container(tmp_path):
    """Each of pyxis's options once: it refuses a second value."""
    site = {"RLAD_CONTAINER_IMAGE": "nvcr.io#nvidia/x:1", "RLAD_CONTAINER_MOUNTS": "/data:/data:ro,/dev/shm:/dev/shm"}
    code, _, called = submit(tmp_path, "name=x y", job="7", then="echo --container-image; exit 3", **site)
    assert code == 3  # of the first step, which places the tasks
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
    """Where Slurm's controller does not answer, the trainer gets its time to save all the same."""
    script = f'set -euo pipefail; source slurm/job.sh; squeue() {{ {squeue}; }}; rlad_tell_to_stop "$1" >/dev/null'
    command = ["bash", "-c", f"{script}; if rlad_is_late; then echo late; fi", "job", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"SLURM_JOB_ID": "7"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, late), done.stderr
    assert (tmp_path / "stop").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["name=x", "-h"]])
def test_help_is_the_scripts_own(tmp_path, arguments):
    """Also where there is neither a site file nor Slurm."""
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
    (tmp_path / "omegaconf.py").write_text("import no_such_package")
    python = tmp_path / "python"
    python.write_text(f'#!{shutil.which("bash")}\nPYTHONPATH={tmp_path}:{ROOT} exec {sys.executable} "$@"\n')
    python.chmod(stat.S_IRWXU)
    code, said, called = submit(tmp_path, RLAD_LOGIN_PYTHON=python)
    assert code == 2 and called is None and len(said.splitlines()) == 1, said
    for part in (
        f"rlad: RLAD_LOGIN_PYTHON={python}",
        "'no_such_package'",
        "omegaconf and PyYAML",
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
