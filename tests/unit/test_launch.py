"""Launching: where tasks go, how they find each other, and what a submission is checked for. No Slurm needed."""

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import ConfigError, RolloutError, TrainingError
from rlad_megatron.launch import slurm
from rlad_megatron.launch.announce import PORTS, announce, free_port, own_address, wait_for
from rlad_megatron.launch.local import no_process_left
from rlad_megatron.launch.nemo_options import check, limit_s, option_parser
from rlad_megatron.launch.placement import Task, expand_nodes, place
from rlad_megatron.servers.supervisor import GRACE_S
from rlad_megatron.trainer.run_state import CONFIG

SCRIPT = str(Path(__file__).parents[2] / "slurm" / "kk_tiny_cpu.sh")
UNUSED = ["name=not-yet-there"]  # the repository may have a run of the demo


def config(*overrides):
    return load_run("kk_tiny_cpu", ["eval.teacher=false", *overrides])


@pytest.mark.parametrize(
    ("hostlist", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],login", ["n08", "n09", "n10", "n12", "login"]),
        ("rack[1-2]n[1-2]", ["rack1n1", "rack1n2", "rack2n1", "rack2n2"]),
        ("a-1,b[3]-gpu", ["a-1", "b3-gpu"]),
    ],
)
def test_host_lists(hostlist, names):
    assert expand_nodes(hostlist) == names


def test_servers_on_nodes_of_their_own():
    run = config("train.gpus_per_node=8", "train.nodes=2", "train.ranks_per_node=8", "student.layout.tensor_parallel=8")
    run = replace(run, rollout=replace(run.rollout, nodes=2, servers=6, tensor_parallel=2))
    plan = place(run, ["a", "b", "c", "d", "spare"])
    assert [(task.node, task.gpus) for task in plan.ranks[6:10]] == [("a", (6,)), ("a", (7,)), ("b", (0,)), ("b", (1,))]
    assert [(task.node, task.gpus) for task in plan.servers] == [
        ("c", (0, 1)),
        ("c", (2, 3)),
        ("c", (4, 5)),
        ("d", (0, 1)),
        ("d", (2, 3)),
        ("d", (4, 5)),
    ]
    assert [step.role for step in plan.steps] == ["trainer", "server"]
    assert (plan.steps[1].first_node, plan.steps[1].nodes, plan.steps[1].tasks_per_node) == (2, 2, 3)
    used = [(task.node, gpu) for task in (*plan.ranks, *plan.servers) for gpu in task.gpus]
    assert len(used) == len(set(used))  # no GPU has two tasks


def test_servers_beside_the_ranks_and_on_their_gpus():
    run = config("train.gpus_per_node=8", "train.ranks_per_node=4", "rollout.servers=2", "rollout.tensor_parallel=2")
    assert [task.gpus for task in place(run, ["a"]).servers] == [(4, 5), (6, 7)]
    run = replace(run, rollout=replace(run.rollout, colocate=True))
    assert [task.gpus for task in place(run, ["a"]).servers] == [(0, 1), (2, 3)]
    cpus = replace(run, train=replace(run.train, gpus_per_node=0))
    assert {task.gpus for task in (*place(cpus, ["a"]).servers, *place(cpus, ["a"]).ranks)} == {()}


def test_a_teacher_on_ranks_of_its_own_beside_the_trainer_and_on_its_nodes():
    run = config("train.gpus_per_node=8", "train.ranks_per_node=4", "teacher.ranks_per_node=2", "rollout.servers=2")
    plan = place(run, ["a"])
    assert [task.gpus for task in plan.teachers] == [(4,), (5,)]
    assert [task.gpus for task in plan.servers] == [(6,), (7,)]
    run = replace(run, teacher=replace(run.teacher, nodes=2), rollout=replace(run.rollout, nodes=1))
    plan = place(run, ["a", "b", "c", "d"])
    assert [(task.name, task.gpus) for task in plan.teachers] == [
        ("teacher rank 0 on node b", (0,)),
        ("teacher rank 1 on node b", (1,)),
        ("teacher rank 2 on node c", (0,)),
        ("teacher rank 3 on node c", (1,)),
    ]
    assert [(task.node, task.gpus) for task in plan.servers] == [("d", (0,)), ("d", (1,))]
    steps = [(step.role, step.first_node, step.nodes, step.tasks, step.tasks_per_node) for step in plan.steps]
    assert steps == [("trainer", 0, 1, 4, 4), ("teacher", 1, 2, 4, 2), ("server", 3, 1, 2, 2)]
    without = replace(run, objective=replace(run.objective, name="grpo"))  # as a configuration that is not validated
    assert place(without, ["a", "d"]).teachers == ()


def test_uneven_servers_match_a_block_distribution():
    run = config("rollout.servers=4", "rollout.nodes=3")
    plan = place(run, ["t", "a", "b", "c"])
    assert [task.node for task in plan.servers] == ["a", "a", "b", "b"]
    assert (plan.steps[1].nodes, plan.steps[1].tasks_per_node) == (2, 2)


@pytest.mark.parametrize(
    ("options", "overrides", "parts"),
    [
        (["--nodes=1"], ["rollout.nodes=1"], ["2 nodes", "rollout.nodes=1", "job has 1", "--nodes=2"]),
        ([], ["train.nodes=3"], ["3 nodes (train.nodes=3", "job has 2"]),
        (
            ["--gpus-per-node=4"],
            ["train.gpus_per_node=8", "rollout.nodes=1"],
            ["train.gpus_per_node=8", "4 GPUs", "--gpus-per-node=8"],
        ),
        (
            ["--gpus-per-node=2"],
            ["train.gpus_per_node=2"],
            ["two tasks would share one", "rollout.colocate=true"],
        ),
        (["-N1"], ["rollout.nodes=1"], ["2 nodes", "job has 1"]),
        (["--gpus-per-node=h100:4"], ["train.gpus_per_node=8"], ["train.gpus_per_node=8", "4 GPUs"]),
        (
            [],
            ["teacher.ranks_per_node=2", "teacher.nodes=1", "rollout.nodes=1"],
            ["3 nodes (train.nodes=1 + teacher.nodes=1 + rollout.nodes=1)", "job has 2", "--nodes=3"],
        ),
        (["--nodes=two"], [], ["--nodes", "'two'"]),
        ([], ["eval.teacher=true"], ["eval.teacher=true", "eval.teacher=false"]),
        ([], ["rollout.urls=['http://n1:1']"], ["rollout.urls", "leave it empty"]),
        ([], ["rollout.tensor_parallel=3"], ["rollout.tensor_parallel=3", "does not divide", "heads"]),
    ],
)
def test_a_submission_that_cannot_work_is_one_clear_line(options, overrides, parts, capsys):
    assert slurm.main(["check", SCRIPT, *options, "kk_tiny_cpu", *UNUSED, "eval.teacher=false", *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("rlad: ")
    for part in parts:
        assert part in err, (part, err)


def test_a_submission_that_can_work_says_nothing(capsys):
    assert slurm.main(["check", SCRIPT, "kk_tiny_cpu", *UNUSED, "eval.teacher=false", "rollout.nodes=1"]) == 0
    assert capsys.readouterr() == ("", "")


def test_checking_a_submission_needs_no_torch():
    code = f"""
import sys
from rlad_megatron.launch import slurm
code = slurm.main(["check", {SCRIPT!r}, "kk_tiny_cpu", *{UNUSED!r}, "eval.teacher=false"])
sys.exit(code or "torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tasks_find_each_other(tmp_path):
    first, second = Task("trainer", 0, "a"), Task("trainer", 1, "b")
    announce(tmp_path, first, port=1)
    threading.Timer(0.3, announce, (tmp_path, second), {"port": 2}).start()
    assert wait_for(tmp_path, [first, second], timeout_s=10, fact="port") == [{"port": 1}, {"port": 2}]


def test_a_task_is_waited_for_until_it_has_said_what_is_asked(tmp_path):
    first = Task("teacher", 0, "a")
    announce(tmp_path, first, port=1)
    assert wait_for(tmp_path, [first], timeout_s=0.1, fact="port") == [{"port": 1}]
    with pytest.raises(RolloutError, match="waited 0.1 s .* teacher rank 0 on node a; see .*teacher_0.log"):
        wait_for(tmp_path, [first], timeout_s=0.1, fact="url")
    announce(tmp_path, first, port=1, url="u")
    assert wait_for(tmp_path, [first], timeout_s=0.1, fact="url") == [{"port": 1, "url": "u"}]


def test_who_is_missing_is_named(tmp_path):
    tasks = [Task("server", index, f"n{index}") for index in range(7)]
    announce(tmp_path, tasks[1], url="http://n1:1")
    with pytest.raises(RolloutError, match=r"waited 0.3 s .* server 0 on node n0, server 2 on node n2.* and 2 more"):
        wait_for(tmp_path, tasks, timeout_s=0.3, fact="url")


def test_a_taken_port_is_passed_over():
    port = free_port("127.0.0.1", 77)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        other = free_port("127.0.0.1", 77)
    assert other != port and {port, other} <= set(PORTS)
    assert free_port("127.0.0.1", 78 + 3 * len(PORTS)) in PORTS


def test_a_node_whose_name_means_itself_is_refused():
    assert own_address("localhost", others=False) == "127.0.0.1"
    with pytest.raises(RolloutError, match="'localhost' is 127.0.0.1 .*cannot reach"):
        own_address("localhost", others=True)
    with pytest.raises(RolloutError, match="'no-such-node.invalid' has no address"):
        own_address("no-such-node.invalid", others=True)


def test_a_task_outside_a_job_says_so():
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set"):
        slurm.Job.from_environment(config(), {})
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "3", "SLURM_PROCID": "1"}
    job = slurm.Job.from_environment(config("rollout.nodes=1"), environment | {"SLURM_RESTART_COUNT": "2"})
    assert job.folder.name == "job_7_2" and job.has_other_nodes
    assert not slurm.Job.from_environment(config("rollout.nodes=1"), environment).config.resume
    with pytest.raises(ConfigError, match="the step has 3 tasks, but the layout has 2"):
        job.one_of(job.placement.ranks)


def test_a_job_goes_on_only_with_a_run_that_is_there(tmp_path, capsys):
    """By itself when Slurm starts it again, from the first step where that start came to nothing; else when told to."""
    run = [f"runs_dir={tmp_path}", "name=first", "rollout.nodes=1"]
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}

    def job(*overrides, restarts):
        job = slurm.Job.from_environment(config(*run, *overrides), environment | {"SLURM_RESTART_COUNT": str(restarts)})
        slurm.print_placement(config(*run, *overrides), environment | {"SLURM_RESTART_COUNT": str(restarts)})
        return job

    def submit(*overrides):
        return slurm.main(["check", SCRIPT, "kk_tiny_cpu", "eval.teacher=false", *run, *overrides])

    for refused in (lambda: job("resume=true", restarts=0), lambda: job("resume=true", "runs_dir=none", restarts=0)):
        with pytest.raises(
            ConfigError, match="resume=true, but .*/first does not exist .* resume=false to start a new"
        ):
            refused()
    assert submit("resume=true") == 2 and "does not exist" in capsys.readouterr().err
    for waiting in ("--dependency=afterany:41", "-d41", "--begin=20:00"):
        assert submit(waiting, "resume=true") == 0  # for a job that makes the folder
    assert not job(restarts=0).config.resume
    assert job(restarts=1).config.resume  # the first start left its logs and no more
    assert submit() == 0 and submit("resume=true") == 0
    (tmp_path / "first" / CONFIG).touch()  # no step and no checkpoint yet
    assert job(restarts=1).config.resume
    assert job("resume=true", restarts=0).config.resume
    assert submit("resume=true") == 0 and submit("--begin=20:00") == 0
    with pytest.raises(ConfigError, match="name=first: .* holds an earlier run; go on with resume=true"):
        job(restarts=0)
    capsys.readouterr()
    assert submit() == 2 and "holds an earlier run" in capsys.readouterr().err
    assert submit("name=frist", "resume=true") == 2
    assert "name=frist" in (said := capsys.readouterr().err) and "did you mean name=first?" in said
    assert submit("runs_dir=/no/such", "resume=true") == 0  # the nodes may have it


def test_a_job_that_stops_twice_at_one_step_is_not_requeued_again(tmp_path):
    def start(restarts):
        environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(restarts)}
        job = slurm.Job.from_environment(config(f"runs_dir={tmp_path}", "name=x"), environment)
        job.folder.mkdir(parents=True)
        return job

    start(0).ask_for_requeue(0)
    assert (tmp_path / "x/logs/job_7_0" / slurm.REQUEUE_FILE).read_text() == "0\n"
    start(1).ask_for_requeue(4)  # there was a step between
    start(2).ask_for_requeue(10)
    again = start(3)
    with pytest.raises(TrainingError, match="told to stop at step 10, as was the start before .* resume=true"):
        again.ask_for_requeue(10)
    assert not (again.folder / slurm.REQUEUE_FILE).exists()
    start(4).ask_for_requeue(10)  # Slurm's own requeue lies between: a node failed


def test_a_launcher_that_is_told_to_end_takes_with_it_what_a_killed_rank_leaves(monkeypatch):
    """Twice told, and what is left does not end by itself."""
    monkeypatch.setattr("rlad_megatron.launch.local.END_S", 1.0)
    again = f"kill -TERM {os.getpid()}"  # by what is told to end, and does not: while the launcher waits for it
    child = f"""['sh', '-c', 'trap "{again}" TERM; echo $$; while :; do sleep 0.1; done']"""
    rank = f"import subprocess; subprocess.Popen({child}).wait()"
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, no_process_left():
        process = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE, text=True)
        with process:
            orphan = psutil.Process(int(process.stdout.readline()))
            process.kill()
        assert orphan.is_running()
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert not orphan.is_running()
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_stopped_server_does_not_wait_for_orphans_that_have_ended():
    """Where a launcher far above takes in orphans too: those that nobody collects look as if they were running."""
    orphan = "import time; print(1, flush=True); time.sleep(600)"
    server = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {orphan!r}]).wait()"
    supervise = "[sys.executable, '-m', 'rlad_megatron.servers.supervisor', str(os.getpid()), *sys.argv[1:]]"
    launcher = (
        "import ctypes, os, signal, subprocess, sys, time; ctypes.CDLL(None).prctl(36, 1)\n"  # PR_SET_CHILD_SUBREAPER
        f"with subprocess.Popen({supervise}, stdout=subprocess.PIPE, text=True) as process:\n"
        "    process.stdout.readline(); process.terminate(); began = time.monotonic()\n"
        "print(time.monotonic() - began)"
    )
    command = [sys.executable, "-c", launcher, sys.executable, "-c", server]
    assert float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) < GRACE_S


def test_a_teacher_that_is_not_on_its_node_is_named_with_the_node(tmp_path):
    missing = tmp_path / "no_teacher"
    run = ["kk_tiny_cpu", "eval.teacher=false", f"runs_dir={tmp_path}", "name=job", f"teacher.path={missing}"]
    folder = tmp_path / "job" / "logs" / "job_7_0"
    folder.mkdir(parents=True)  # made by the job's placement
    done = subprocess.run(
        [sys.executable, "-m", "rlad_megatron.launch.slurm", "teach", *run, "teacher.ranks_per_node=1"],
        env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost,other"},
        capture_output=True,
        text=True,
    )
    said = f"teacher rank 0 on node localhost: teacher.path={missing}: {missing}/config.json: not found; give a folder"
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"rlad: {said}")
    assert (folder / "failed").read_text().startswith(said)  # which the batch script shows last


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("02:00:01", 7201), ("1-2", 93600), ("1-0:30", 88200), ("2-0:0:5", 172805)],
)
def test_time_limits_as_sbatch_reads_them(time, seconds):
    assert limit_s(time) == seconds


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--nodes=4"], ["the layout needs 8 nodes", "has 4"]),
        (["--gpus-per-node=4"], ["train.gpus_per_node=8", "4 GPUs"]),
        (["--container-image=/no/such.sqsh"], ["--container-image=/no/such.sqsh", "no such file"]),
        (["rollout.tensor_parallel=3", "rollout.servers=8"], ["rollout.tensor_parallel=3 does not divide", "heads"]),
        (["rollout.nodes=0"], ["two tasks would share one", "rollout.colocate=true"]),
        (["--python=/no/such"], ["--python=/no/such", "make setup"]),
        (["--time=5h"], ["--time=5h", "MINUTES:SECONDS", "DAYS-HOURS"]),
        (["--time=1-2-3"], ["--time=1-2-3"]),
        (["--time=1-12:30"], ["no Slurm on this machine"]),
        (["--time=Unlimited"], ["no Slurm on this machine"]),
        (["--signal=USR1@60"], ["--signal=USR1@60", "B:USR1@SECONDS"]),
        (["--time=30"], ["--time=30", "--signal=B:USR1@1800", "a longer --time"]),
        (["--time=30:01"], ["no Slurm on this machine"]),
        (["name=a b"], ["no spaces", "name=a b"]),
        (["name=x"], ["no Slurm on this machine", "login node", "--dryrun"]),
    ],
)
def test_what_rlad_nemo_refuses(words, parts, monkeypatch):
    """Of its own environment and NeMo-Run: tests/slurm/test_nemo.py."""
    monkeypatch.setenv("PATH", "")  # no sbatch
    words = ["math_r1_distill_7b_from_32b", "--executor=slurm", f"--python={sys.executable}", *words]
    options = option_parser().parse_intermixed_args(words)
    with pytest.raises(ConfigError) as caught:
        check(load_run(options.recipe, options.overrides), options)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
