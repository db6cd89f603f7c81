"""The script that users submit, on a real Slurm cluster of two nodes (cluster.sh).

Each node has its own network, host name, processes and /dev/shm, so ranks, servers and weights communicate as between
hosts. Skipped, with the reason, if Slurm is not installed or cannot run.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from rlad_megatron.config.recipe import load_run, to_yaml
from rlad_megatron.servers.transfer.weights_file import possible_files

pytestmark = pytest.mark.slurm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = ROOT / "slurm" / "kk_tiny_cpu.sh"
SMALL = [
    "train.steps=4",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "data.train_size=64",
    "data.eval_size=32",
    "student.layout.tensor_parallel=2",  # so that servers get the weights from shards
    "eval.every=0",
    "checkpoint.every=0",
]
END_S = 120  # for all of a job to end, which takes some seconds; a leaked server never ends
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "nsenter", "unshare")


def why_not() -> str:
    """Why a cluster cannot run here; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a test cluster needs root on Linux"
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (make slurm-deps)"
    probe = "ip netns add rladprobe$$ && ip netns del rladprobe$$ && unshare --uts --pid --fork --mount true"
    tried = subprocess.run(probe, shell=True, capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"no namespaces on this machine: {tried.stderr.strip()}"


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "RLAD_SITE": str(HERE / "site.sh"),
            "RLAD_TEST_PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
        }

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stdout + done.stderr)
        return done.stdout

    def submit(self, name: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """sbatch of the script; returns the job's id."""
        output = f"--output={self.folder / name}.out"
        run = [f"runs_dir={self.runs}", f"name={name}"]
        return self.call("sbatch", "--parsable", output, *options, str(SCRIPT), *SMALL, *run, *arguments).strip()

    def shown(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in shown.split())

    def state(self, job: str) -> str:
        return self.shown(job)["JobState"]

    def wait(self, condition, what: str, timeout: float = 400) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what} took more than {timeout} s\n{self.said()}"
            time.sleep(0.2)

    def wait_for_end(self, job: str, state: str, timeout: float = 400) -> None:
        # Not "until it is no longer RUNNING": a signalled job is SIGNALING for a moment.
        self.wait(lambda: self.state(job) in ENDS, job, timeout)
        assert self.state(job) == state, self.said()

    def output(self, name: str) -> str:
        file = self.folder / f"{name}.out"
        return file.read_text() if file.exists() else ""

    def said(self) -> str:
        """All output of the jobs and their tasks, for a failed test."""
        files = [*self.folder.glob("*.out"), *self.runs.glob("*/logs/job_*/*.log"), *self.runs.glob("*/logs/*.log")]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def processes(self, job: str) -> list[psutil.Process]:
        """All processes of a job, on both nodes."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_JOB_ID") == job and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def tasks(self, job: str, word: str, index: int = 0) -> list[psutil.Process]:
        """The processes of the tasks with that number whose command has the word, the oldest first.

        Others come and go meanwhile, and what a task starts looks like the task until it has become another program.
        """
        found = []
        for process in self.processes(job):
            with contextlib.suppress(psutil.Error):
                number = process.environ().get("SLURM_PROCID")
                if word in process.cmdline() and number == str(index) and process.name() != "srun":
                    found.append(process)
        return sorted(found, key=psutil.Process.create_time)


@pytest.fixture(scope="module")
def cluster():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    # Not under pytest's folder: a socket's path may have 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="rlad-slurm-", dir="/tmp"))
    with open("/tmp/rlad-slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # node names are global on this machine: one cluster at a time
        try:
            subprocess.run([HERE / "cluster.sh", "up", folder], check=True, timeout=200)
            yield Cluster(folder)
        finally:
            subprocess.run([HERE / "cluster.sh", "down", folder], check=True, timeout=200)
            shutil.rmtree(folder)


def node_daemon(node: str) -> psutil.Process:
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] == ["slurmd", "-D", "-N", node]
    ]
    return min(found, key=psutil.Process.create_time)  # a child looks the same until it calls exec


def waited_for(cluster, name):
    return "\nrlad: " in cluster.output(name)


@pytest.fixture(scope="module")
def without_a_node(cluster):
    """Two jobs whose second node does not answer. Used by the first tests, because no other job may need the node."""
    daemon = node_daemon("rlad2")
    daemon.suspend()
    layout = ["train.nodes=2", "train.ranks_per_node=1", "rollout.nodes=0"]
    try:
        missing = cluster.submit("missing", *layout, "rollout.startup_timeout_s=4")
        late = cluster.submit("late", *layout, options=("--time=1",))
        cluster.wait(lambda: "tasks write to" in cluster.output("late"), "the start")
        cluster.call("scancel", "--batch", "--signal=USR1", late)
        for name in ("missing", "late"):
            cluster.wait(lambda name=name: waited_for(cluster, name), f"the end of {name}")
    finally:
        daemon.resume()
    return missing, late


def test_a_missing_node_is_named(cluster, without_a_node):
    cluster.wait_for_end(without_a_node[0], "FAILED")
    last = cluster.output("missing").splitlines()[-1]
    assert "waited 4 s (rollout.startup_timeout_s) for trainer rank 1 on node rlad2" in last, cluster.output("missing")


def test_a_run_that_cannot_stop_before_its_limit_says_so(cluster, without_a_node):
    cluster.wait_for_end(without_a_node[1], "FAILED")  # and not TIMEOUT
    last = cluster.output("late").splitlines()[-1]
    assert "its start or its step did not end in time (newest checkpoint: none)" in last, cluster.output("late")


def test_scancel_leaves_nothing_running(cluster):
    job = cluster.submit("cancelled")
    cluster.wait(lambda: cluster.tasks(job, "rlad_megatron.servers.api_server"), "a server")
    # Batch script, two ranks, server, and the processes between them.
    cluster.wait(lambda: len(cluster.processes(job)) > 6, "the others")
    cluster.call("scancel", job)
    cluster.wait(lambda: not cluster.processes(job), "the end of all tasks", timeout=END_S)
    cluster.wait_for_end(job, "CANCELLED", timeout=END_S)


@pytest.fixture(scope="module")
def jobs(cluster):
    """A run to stop and two to break, at the same time to save time. Two have a dedicated teacher."""
    one_rank_each = ["train.nodes=2", "train.ranks_per_node=1", "rollout.nodes=0"]
    own_node = ["rollout.nodes=0", "teacher.nodes=1", "teacher.ranks_per_node=1"]
    return (
        cluster.submit("whole", "teacher.ranks_per_node=1"),
        cluster.submit("broken", *one_rank_each),
        cluster.submit("untaught", *own_node),
    )


def test_a_killed_rank_ends_the_job_and_is_named(cluster, jobs):
    job = jobs[1]
    (folder,) = waited(cluster, lambda: list(cluster.runs.glob("broken/logs/job_*")))
    log = folder / "trainer_0.log"
    # Both ranks, on two nodes, are in the process group now, and the server is starting.
    cluster.wait(lambda: log.exists() and "waiting for the rollout servers" in log.read_text(), "the ranks' start")
    rank = cluster.tasks(job, "train", 1)[0]
    last = said_after_a_kill(cluster, job, rank, "broken")
    assert "the trainer step failed first" in last and "rlad2: task 1: Killed" in last and "trainer_1.log" in last, last


def test_a_killed_teacher_ends_the_job_and_is_named(cluster, jobs):
    job = jobs[2]
    (folder,) = waited(cluster, lambda: list(cluster.runs.glob("untaught/logs/job_*")))
    log = folder / "teacher_0.log"
    cluster.wait(lambda: log.exists() and "answers at http://198.18.77.2:" in log.read_text(), "the teacher's start")
    # Trainer and server share a node. The signals to the whole job can kill rank 0 and its child that removes the file:
    # then the server's task does.
    memory = Path(f"/proc/{node_daemon('rlad1').pid}/root/dev/shm")
    waited(cluster, lambda: list(memory.glob("rlad_*")))
    for watcher in cluster.tasks(job, "rlad_megatron.launch.scratch"):
        if "train" in watcher.parent().cmdline():
            watcher.kill()
    teacher = cluster.tasks(job, "teach")[0]
    last = said_after_a_kill(cluster, job, teacher, "untaught")
    assert "the teacher" in last and "teacher_0.log" in last, last
    assert not list(memory.glob("rlad_*"))


def said_after_a_kill(cluster, job, process, name):
    """Kill a task and wait for the end of all; returns the last line of the job's output."""
    killed = time.time()
    process.kill()
    cluster.wait_for_end(job, "FAILED", timeout=END_S)
    ended = datetime.fromisoformat(cluster.shown(job)["EndTime"]).timestamp()
    assert ended - killed < 30  # they are told to end, and killed after 20 s
    cluster.wait(lambda: not cluster.processes(job), "the end of the others", timeout=END_S)
    return cluster.output(name).splitlines()[-1]


def waited(cluster, find, timeout=400):
    cluster.wait(find, "a file", timeout)
    return find()


@pytest.mark.timeout(1200)  # two starts, while two other jobs run
def test_a_run_told_to_stop_is_requeued_and_resumes_at_its_step(cluster, jobs):
    job, folder = jobs[0], cluster.runs / "whole"
    metrics = folder / "metrics.jsonl"
    cluster.wait(lambda: metrics.exists() and '"step": 1' in metrics.read_text(), "the first step")
    ranks = [cluster.tasks(job, "train", index)[0] for index in (0, 1)]
    for rank in ranks:  # the run is short, and must not finish before the signal
        rank.suspend()
    # Servers are on another node: no file carries the weights, which were pushed already.
    in_memory, in_folder = possible_files(folder)
    for node in ("rlad1", "rlad2"):
        assert not Path(f"/proc/{node_daemon(node).pid}/root{in_memory}").exists()
    assert not in_folder.exists()
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    cluster.wait(lambda: "told to stop at" in cluster.output("whole"), "the signal")
    for rank in ranks:
        rank.resume()
    cluster.wait(lambda: "requeueing" in cluster.output("whole"), "the stop")
    saved = int((folder / "checkpoints" / "latest").read_text())
    assert 1 <= saved < 4
    done = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert done == list(range(saved + 1))  # every completed step is in the checkpoint

    cluster.wait_for_end(job, "COMPLETED")
    logs = folder / "logs"
    assert f"resumed after step {saved}" in (logs / f"job_{job}_1" / "trainer_0.log").read_text()
    lines = {line["step"]: line for line in map(json.loads, metrics.read_text().splitlines())}
    assert len(metrics.read_text().splitlines()) == 5 and sorted(lines) == [0, 1, 2, 3, 4]
    assert max(line["mismatch/abs_max"] for step, line in lines.items() if step) < 1e-3
    assert max(line["sync/probe_abs_max"] for step, line in lines.items() if step) < 1e-3
    assert "collective" in (logs / "vllm_0.log").read_text()  # the backend
    # What a run on one machine writes (tests/e2e), and the logs of the tasks.
    expected = {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "rollouts", "timeline", "timeline.json"}
    expected |= {"hf", "report.html", "logs"}
    assert {path.name for path in folder.iterdir()} == expected
    assert (folder / "checkpoints" / "latest").read_text() == "4"
    assert "urls: []" in (folder / "config.yaml").read_text()  # a job's servers are not part of the configuration
    # The teacher was a separate step on the trainer's node; servers and ranks were on different nodes.
    assert "the teacher answers at http://198.18.77.1:" in (logs / f"job_{job}_1" / "teacher_0.log").read_text()
    assert (
        "server 0 on node rlad2 answers at http://198.18.77.2:" in (logs / f"job_{job}_1" / "server_0.log").read_text()
    )
    cluster.wait(lambda: not cluster.processes(job), "the end of the server", timeout=END_S)


SCRIPT_OF_AN_ARRAY = """\
#!/usr/bin/env bash
#SBATCH --ntasks-per-node=2 --requeue --open-mode=append --output={folder}/array_%a.out
set -euo pipefail
source slurm/job.sh
rlad_job {folder}/mine.yaml name=array_$SLURM_ARRAY_TASK_ID runs_dir={folder}/runs -- "$@"
"""
# Replaces the Python of all tasks except the placement. The second task stops once, after the recipe was edited.
TASKS_OF_AN_ARRAY = """\
#!/usr/bin/env bash
start={folder}/runs/array_$SLURM_ARRAY_TASK_ID/logs/job_${{SLURM_JOB_ID}}_${{SLURM_RESTART_COUNT:-0}}
wait_for() {{ until [[ -e $1 ]]; do sleep 0.2; done; }}
case $3$SLURM_ARRAY_TASK_ID${{SLURM_RESTART_COUNT:-0}} in
    place*) exec {python} "$@" ;;
    serve*) exec sleep 600 ;;
    train10) wait_for {folder}/edited && echo 1 >"$start/requeue" ;;
    *) wait_for {folder}/end && touch "$start/finished" ;;
esac
"""


def test_one_task_of_a_job_array_is_requeued_with_its_configuration(cluster, monkeypatch):
    """The last task's SLURM_JOB_ID is the id of the whole array, so commands must not use it."""
    recipe, python, site = (cluster.folder / name for name in ("mine.yaml", "tasks", "site.sh"))
    lines = to_yaml(load_run("kk_tiny_cpu", ["eval.teacher=false", "train.steps=4"]))
    recipe.write_text(lines)
    python.write_text(TASKS_OF_AN_ARRAY.format(folder=cluster.folder, python=sys.executable))
    python.chmod(0o755)
    site.write_text(f"RLAD_PYTHON={python}\nexport PYTHONPATH={ROOT}\n")
    monkeypatch.setitem(cluster.environment, "RLAD_SITE", str(site))
    script = cluster.folder / "array.sh"
    script.write_text(SCRIPT_OF_AN_ARRAY.format(folder=cluster.folder))

    array = cluster.call("sbatch", "--parsable", "--array=0-1", str(script)).strip()
    started = [cluster.runs / f"array_{index}" / "logs" for index in (0, 1)]
    cluster.wait(lambda: all(list(folder.glob("job_*_0/config.yaml")) for folder in started), "the start of both")
    recipe.write_text(lines.replace("steps: 4", "steps: 9"))
    (cluster.folder / "edited").touch()
    cluster.wait(lambda: list(started[1].glob("job_*_1/config.yaml")), "the second start of one")
    first, second = (cluster.shown(f"{array}_{index}") for index in (0, 1))
    assert (first["JobState"], first["Restarts"]) == ("RUNNING", "0"), cluster.said()
    assert second["Restarts"] == "1" and second["JobId"] == array
    assert "steps: 4" in next(started[1].glob("job_*_1/config.yaml")).read_text()
    (cluster.folder / "end").touch()
    for index in (0, 1):
        cluster.wait_for_end(f"{array}_{index}", "COMPLETED")


# Replaces the Python of a study's tasks. The second one stops when it is told to, and goes on at its second start.
TASKS_OF_A_STUDY = """\
#!/usr/bin/env bash
wait_for() {{ until [[ -e $1 ]]; do sleep 0.2; done; }}
[[ "$1 $2 $3 $4 $5 $7" == "-m rlad_megatron.cli study kk_objectives --task --stop-file" ]] || exit 1
touch {folder}/started_$6_${{SLURM_RESTART_COUNT:-0}}
case $6${{SLURM_RESTART_COUNT:-0}} in
    10) wait_for "$8" && exit 143 ;;
    *) wait_for {folder}/study_end ;;
esac
"""


def test_one_task_of_a_study_stops_and_is_requeued_without_the_others(cluster, monkeypatch):
    python, site = cluster.folder / "study_tasks", cluster.folder / "study_site.sh"
    python.write_text(TASKS_OF_A_STUDY.format(folder=cluster.folder))
    python.chmod(0o755)
    site.write_text(f"RLAD_PYTHON={python}\n")
    monkeypatch.setitem(cluster.environment, "RLAD_SITE", str(site))
    options = ["--array=0-1", "--parsable", f"--output={cluster.folder}/study_%a.out"]
    array = cluster.call(str(ROOT / "slurm" / "study.sh"), "kk_objectives", *options).strip()
    for index in (0, 1):
        cluster.wait((cluster.folder / f"started_{index}_0").exists, f"the start of task {index}")
    cluster.call("scancel", "--batch", "--signal=USR1", f"{array}_1")  # as Slurm does before the time limit
    cluster.wait((cluster.folder / "started_1_1").exists, "the second start of one")
    first, second = (cluster.shown(f"{array}_{index}") for index in (0, 1))
    assert (first["JobState"], first["Restarts"], second["Restarts"]) == ("RUNNING", "0", "1"), cluster.said()
    (cluster.folder / "study_end").touch()
    for index in (0, 1):
        cluster.wait_for_end(f"{array}_{index}", "COMPLETED")
    assert not (cluster.folder / "started_0_1").exists() and "requeueing" in cluster.output("study_1")


RLAD_NEMO = ROOT / ".venv-nemo" / "bin" / "rlad-nemo"


@pytest.mark.skipif(not RLAD_NEMO.exists(), reason="no NeMo-Run environment (make nemo-env)")
def test_nemo_runs_script_for_64_gpus_is_accepted(cluster, tmp_path):
    recipe = [str(RLAD_NEMO), "math_r1_distill_7b_from_32b", "--executor=slurm", "--partition=gpu", "--dryrun"]
    script = cluster.call(*recipe, f"--python={sys.executable}", f"runs_dir={tmp_path}", "name=nemo")
    assert script.startswith("#!/bin/bash")
    assert "#SBATCH --nodes=8\n" in script and "#SBATCH --gpus-per-node=8\n" in script
    steps = [line for line in script.splitlines() if line.startswith("srun --output")]
    assert len(steps) == 2  # two task groups: trainer and servers
    frozen = r"runs/.submitted/nemo-[\w-]+\.yaml"
    assert re.search(rf"--nodes=4 --relative=0 --ntasks=32 --ntasks-per-node=8 .* train {frozen}", steps[0]), steps
    assert re.search(rf"--nodes=4 --relative=4 --ntasks=32 --ntasks-per-node=8 .* serve {frozen}", steps[1]), steps
    config = load_run(str(ROOT / re.search(frozen, script)[0]), [])
    assert (config.name, config.runs_dir) == ("nemo", str(tmp_path))
    assert not any(tmp_path.iterdir())
    file = tmp_path / "nemo.sh"
    file.write_text(script)
    cluster.call("sbatch", "--test-only", str(file))
    cluster.call("sbatch", "--test-only", "--partition=gpu", str(ROOT / "slurm" / "rlad_32b_to_7b.sh"))


@pytest.mark.skipif(not RLAD_NEMO.exists(), reason="no NeMo-Run environment (make nemo-env)")
def test_nemo_runs_script_says_so_too_when_a_run_cannot_stop_before_its_limit(cluster, tmp_path, monkeypatch):
    """The server's node does not answer for a minute. The script gets two signals, as from Slurm and a user."""
    recipe = [str(RLAD_NEMO), "kk_tiny_cpu", "--executor=slurm", "--partition=test", "--time=00:01:00", "--dryrun"]
    recipe.append("--signal=B:USR1@1")  # an earlier one could come before the script sets its trap, and kill it
    run = ["eval.teacher=false", "rollout.nodes=1", f"--python={sys.executable}", f"runs_dir={cluster.runs}"]
    file = tmp_path / "nemo.sh"
    monkeypatch.setitem(cluster.environment, "NEMORUN_HOME", str(cluster.folder))
    file.write_text(cluster.call(*recipe, *run, "name=nemo"))
    for folder in re.findall(r" --chdir (/\S+)", file.read_text()):  # which --dryrun does not create
        Path(folder).mkdir(parents=True, exist_ok=True)
    output = f"--output={cluster.folder / 'nemo.out'}"
    daemon = node_daemon("rlad2")
    daemon.suspend()
    try:
        job = cluster.call("sbatch", "--parsable", output, str(file)).strip()
        cluster.wait(lambda: list(cluster.runs.glob("nemo/logs/job_*/trainer_0.json")), "the start")
        for _ in range(2):
            cluster.call("scancel", "--batch", "--signal=USR1", job)
        cluster.wait(lambda: waited_for(cluster, "nemo"), "the end")
    finally:
        daemon.resume()
    cluster.wait_for_end(job, "FAILED")  # and not TIMEOUT
    last = cluster.output("nemo").splitlines()[-1]
    assert last.startswith("rlad: told to stop before the time limit"), cluster.output("nemo")[-3000:]
