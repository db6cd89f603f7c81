"""`rlad-nemo` in its environment. test_slurm.py tests its scripts on a cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

from rlad_megatron.config.recipe import recipe_names

ROOT = Path(__file__).parents[2]
RLAD_NEMO = ROOT / ".venv-nemo" / "bin" / "rlad-nemo"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not RLAD_NEMO.exists(), reason="no NeMo-Run environment (make nemo-env)"),
]


def launch(tmp_path, *arguments, **environment):
    return subprocess.run(
        [RLAD_NEMO, *arguments, f"runs_dir={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"NEMORUN_HOME": str(tmp_path / "nemo"), "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_the_tiny_recipe_runs_on_this_machine(tmp_path):
    small = ["train.steps=1", "rollout.prompts_per_step=8", "rollout.group_size=4", "data.train_size=64"]
    small += ["data.eval_size=32", "eval.teacher=false", "name=tiny", f"rollout.port={free_port()}"]
    done = launch(tmp_path, "kk_tiny_cpu", "--executor=local", f"--python={sys.executable}", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert (tmp_path / "tiny" / "hf" / "config.json").exists() and (tmp_path / "tiny" / "report.html").exists()


def test_a_task_on_this_machine_reads_the_frozen_configuration(tmp_path):
    done = launch(tmp_path, "kk_tiny_cpu", "--executor=local", f"--python={sys.executable}", "--dryrun", "name=once")
    assert " train runs/.submitted/once-" in done.stdout, done.stdout + done.stderr


def test_tasks_in_a_container(tmp_path):
    """NeMo-Run passes --container-workdir and pyxis refuses a second one, so the tasks change folder themselves."""
    options = ["--executor=slurm", "--container-image=nvcr.io#nvidia/x:1", "--python=/opt/rlad/bin/python", "--dryrun"]
    own_teacher = ["teacher.nodes=1", "teacher.ranks_per_node=8"]
    done = launch(tmp_path, "math_r1_distill_7b_from_32b", *options, *own_teacher)
    assert "#SBATCH --nodes=9\n" in done.stdout, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("srun --output")]
    assert len(steps) == 3, done.stderr
    assert "--nodes=1 --relative=4 --ntasks=8 --ntasks-per-node=8" in steps[1]
    assert " teach runs/.submitted/math_r1_distill_7b_from_32b-" in steps[1]
    for step in steps:
        assert step.count("--container-workdir") == 1 and step.count("--container-writable") == 1
        assert f" env --chdir={ROOT} /opt/rlad/bin/python -m rlad_megatron.launch.slurm " in step
        assert f"{ROOT}:{ROOT},/dev/shm:/dev/shm," in step


def test_what_sbatch_refuses_is_said_in_the_last_line(tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpus' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    options = [
        "--executor=slurm",
        "--partition=gpus",
        f"--python={sys.executable}",
        "eval.teacher=false",
        "name=refused",
    ]
    done = launch(tmp_path, "kk_tiny_cpu", *options, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("rlad: the job was not submitted: sbatch: error: invalid partition")
    assert not list(ROOT.glob("runs/.submitted/refused-*"))


def test_an_error_of_nemo_runs_own_command_line_is_one_line(tmp_path):
    command = [RLAD_NEMO.with_name("nemorun"), "rlad", "train", "--yes", "recipe=kk_tiny_cpu", "recipe.train.steps=0"]
    environment = os.environ | {"NEMORUN_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "rlad: train.steps=0 must be at least 1"


CODE = """
import json, sys
from nemo_run.cli.api import list_factories
from rlad_megatron.config import RunConfig
from rlad_megatron.launch.nemo import main
print(json.dumps([factory.__name__ for factory in list_factories(RunConfig)]))
sys.exit(main(["math_r1_distill_7b_from_32b", "--executor=slurm", f"--python={sys.executable}"]))
"""


def test_both_command_lines_in_an_environment_without_torch():
    environment = os.environ | {"PATH": "", "PYTHONPATH": str(ROOT)}  # no sbatch
    command = [RLAD_NEMO.with_name("python"), "-c", CODE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert sorted(json.loads(done.stdout)) == sorted(recipe_names())  # as factories of NeMo-Run's own
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("rlad: --executor slurm: no Slurm on this machine")
