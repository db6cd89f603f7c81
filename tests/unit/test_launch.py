"""Launching: placement, rendezvous, frozen configurations and the checks of a submission. Needs no Slurm."""

import _ctypes
import ctypes
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rlad_megatron.config.placement import Task, place, with_role
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import ConfigError, RankError, RladError, RolloutError, TeacherError, TrainingError
from rlad_megatron.launch import frozen, local, slurm
from rlad_megatron.launch.allocation import check_job, expand_nodes, steps
from rlad_megatron.launch.nemo_options import check, limit_s, option_parser
from rlad_megatron.launch.preflight import check_train
from rlad_megatron.launch.ranks import Ended, _what_failed
from rlad_megatron.launch.rendezvous import node_address, publish, set_rank_environment, wait_for
from rlad_megatron.models import config_json
from rlad_megatron.models.registry import as_model_spec
from rlad_megatron.parallel.ports import PORTS, free_port
from rlad_megatron.servers.process import HOST
from rlad_megatron.servers.supervisor import GRACE_S
from rlad_megatron.servers.transfer.weights_file import possible_files
from rlad_megatron.trainer.run_state import CONFIG

SCRIPT = str(Path(__file__).parents[2] / "slurm" / "kk_tiny_cpu.sh")
UNUSED = ["name=not-yet-there"]  # the repository may have a run of the demo


def config(*overrides):
    return load_run("kk_tiny_cpu", ["eval.teacher=false", *overrides])


def where(tasks, role):
    return [(task.host, task.gpus) for task in with_role(tasks, role)]


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """The folder of frozen configurations."""
    monkeypatch.setattr(frozen, "SUBMITTED", tmp_path / "submitted")
    return tmp_path / "submitted"


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
    tasks = place(run, ["a", "b", "c", "d", "spare"])
    assert where(tasks, "trainer")[6:10] == [("a", (6,)), ("a", (7,)), ("b", (0,)), ("b", (1,))]
    assert where(tasks, "server") == [
        ("c", (0, 1)),
        ("c", (2, 3)),
        ("c", (4, 5)),
        ("d", (0, 1)),
        ("d", (2, 3)),
        ("d", (4, 5)),
    ]
    trainer, servers = steps(tasks)
    assert (trainer.role, servers.role) == ("trainer", "server")
    assert (servers.first_node, servers.nodes, servers.tasks_per_node) == (2, 2, 3)
    assert [(task.role, task.index, task.node, task.gpus) for task in place(run)] == [
        (task.role, task.index, task.node, task.gpus) for task in tasks
    ]
    used = [(task.node, gpu) for task in tasks for gpu in task.gpus]
    assert len(used) == len(set(used))  # no GPU has two tasks


def test_servers_beside_the_ranks_and_on_their_gpus():
    run = config("train.gpus_per_node=8", "train.ranks_per_node=4", "rollout.servers=2", "rollout.tensor_parallel=2")
    assert where(place(run, ["a"]), "server") == [("a", (4, 5)), ("a", (6, 7))]
    run = replace(run, rollout=replace(run.rollout, colocate=True))
    assert where(place(run, ["a"]), "server") == [("a", (0, 1)), ("a", (2, 3))]
    cpus = replace(run, train=replace(run.train, gpus_per_node=0))
    assert {task.gpus for task in place(cpus, ["a"])} == {()}


def test_a_teacher_on_ranks_of_its_own_beside_the_trainer_and_on_its_nodes():
    run = config("train.gpus_per_node=8", "train.ranks_per_node=4", "teacher.ranks_per_node=2", "rollout.servers=2")
    tasks = place(run, ["a"])
    assert where(tasks, "teacher") == [("a", (4,)), ("a", (5,))]
    assert where(tasks, "server") == [("a", (6,)), ("a", (7,))]
    run = replace(run, teacher=replace(run.teacher, nodes=2), rollout=replace(run.rollout, nodes=1))
    tasks = place(run, ["a", "b", "c", "d"])
    assert [(task.name, task.gpus) for task in with_role(tasks, "teacher")] == [
        ("teacher rank 0 on node b", (0,)),
        ("teacher rank 1 on node b", (1,)),
        ("teacher rank 2 on node c", (0,)),
        ("teacher rank 3 on node c", (1,)),
    ]
    assert where(tasks, "server") == [("d", (0,)), ("d", (1,))]
    groups = [(step.role, step.first_node, step.nodes, step.tasks, step.tasks_per_node) for step in steps(tasks)]
    assert groups == [("trainer", 0, 1, 4, 4), ("teacher", 1, 2, 4, 2), ("server", 3, 1, 2, 2)]
    without = replace(run, objective=replace(run.objective, name="grpo"))  # as a configuration that is not validated
    assert where(place(without, ["a", "d"]), "teacher") == []


def test_a_role_that_has_the_machine_to_itself():
    run = config("train.gpus_per_node=8", "train.ranks_per_node=4", "rollout.servers=2", "rollout.tensor_parallel=2")
    assert where(place(run, only="server"), "server") == [("", (0, 1)), ("", (2, 3))]
    assert [gpus for _, gpus in where(place(run, only="teacher"), "teacher")] == [(0,), (1,), (2,), (3,)]
    dedicated = replace(run, teacher=replace(run.teacher, ranks_per_node=2))
    assert [gpus for _, gpus in where(place(dedicated, only="teacher"), "teacher")] == [(0,), (1,)]
    on_cpus = replace(run, train=replace(run.train, gpus_per_node=0))
    assert {task.gpus for task in place(on_cpus, only="teacher")} == {()}


def test_uneven_servers_match_a_block_distribution():
    run = config("rollout.servers=4", "rollout.nodes=3")
    tasks = place(run, ["t", "a", "b", "c"])
    assert [host for host, _ in where(tasks, "server")] == ["a", "a", "b", "b"]
    assert (steps(tasks)[1].nodes, steps(tasks)[1].tasks_per_node) == (2, 2)


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
    assert slurm.main(["submit", SCRIPT, *options, "kk_tiny_cpu", *UNUSED, "eval.teacher=false", *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("rlad: ")
    for part in parts:
        assert part in err, (part, err)


def test_a_submission_that_can_work_prints_the_file_of_its_configuration(submitted, capsys):
    run = [*UNUSED, "eval.teacher=false", "rollout.nodes=1"]
    files = []
    for _ in range(2):  # two submissions of one name
        assert slurm.main(["submit", SCRIPT, "kk_tiny_cpu", *run]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        files.append(Path(out.strip()))
    assert sorted(submitted.iterdir()) == sorted(files) and files[0] != files[1]
    assert load_run(str(files[0]), []) == load_run("kk_tiny_cpu", run)


def test_the_checks_before_a_start_read_each_model_once(tmp_path, monkeypatch):
    read = []

    def parse(fields, where):
        read.append(Path(where).parent.name)
        return as_model_spec(fields, where)

    monkeypatch.setattr(config_json, "as_model_spec", parse)
    run = config(f"runs_dir={tmp_path}", "data.train_size=64", "data.eval_size=8", f"rollout.port={free_port(HOST, 7)}")
    for checked in (lambda: check_train(run), lambda: check_job(run, 2, None)):
        read.clear()
        checked()
        assert sorted(read) == ["kk_tiny_student", "kk_tiny_teacher"]


def test_checking_a_submission_needs_no_torch(tmp_path):
    code = f"""
import sys
from rlad_megatron.launch import slurm
slurm.frozen.SUBMITTED = slurm.Path({str(tmp_path)!r})
code = slurm.main(["submit", {SCRIPT!r}, "kk_tiny_cpu", *{UNUSED!r}, "eval.teacher=false"])
sys.exit(code or "torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_tasks_find_each_other(tmp_path):
    first, second = Task("trainer", 0, 0, host="a"), Task("trainer", 1, 1, host="b")
    publish(tmp_path, first, port=1)
    threading.Timer(0.3, publish, (tmp_path, second), {"port": 2}).start()
    assert wait_for(tmp_path, [first, second], timeout_s=10, fact="port") == [{"port": 1}, {"port": 2}]


def test_a_task_is_waited_for_until_it_has_said_what_is_asked(tmp_path):
    first = Task("teacher", 0, 0, host="a")
    publish(tmp_path, first, port=1)
    assert wait_for(tmp_path, [first], timeout_s=0.1, fact="port") == [{"port": 1}]
    with pytest.raises(RolloutError, match="waited 0.1 s .* teacher rank 0 on node a; see .*teacher_0.log"):
        wait_for(tmp_path, [first], timeout_s=0.1, fact="url")
    publish(tmp_path, first, port=1, url="u")
    assert wait_for(tmp_path, [first], timeout_s=0.1, fact="url") == [{"port": 1, "url": "u"}]


def test_who_is_missing_is_named(tmp_path):
    tasks = [Task("server", index, index, host=f"n{index}") for index in range(7)]
    publish(tmp_path, tasks[1], url="http://n1:1")
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
    assert node_address("localhost", multi_node=False) == "127.0.0.1"
    with pytest.raises(RolloutError, match="'localhost' is 127.0.0.1 .*cannot reach"):
        node_address("localhost", multi_node=True)
    with pytest.raises(RolloutError, match="'no-such-node.invalid' has no address"):
        node_address("no-such-node.invalid", multi_node=True)


def test_a_task_outside_a_job_says_so():
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set"):
        slurm.Job.from_environment(config(), {})
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "3", "SLURM_PROCID": "1"}
    job = slurm.Job.from_environment(config("rollout.nodes=1"), environment | {"SLURM_RESTART_COUNT": "2"})
    assert job.folder.name == "job_7_2"
    assert not slurm.Job.from_environment(config("rollout.nodes=1"), environment).config.resume
    with pytest.raises(ConfigError, match="the step has 3 tasks, but the layout has 2"):
        job.this_task("trainer")


def test_a_job_goes_on_only_with_a_run_that_is_there(tmp_path, submitted, capsys):
    """After a requeue by itself, even if the earlier start made no checkpoint; otherwise with resume=true."""
    run = [f"runs_dir={tmp_path}", "name=first", "rollout.nodes=1"]
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}

    def job(*overrides, restarts):
        start = environment | {"SLURM_RESTART_COUNT": str(restarts)}
        slurm.place_job("kk_tiny_cpu", ["eval.teacher=false", *run, *overrides], start)
        return slurm.Job.from_environment(config(*run, *overrides), start)

    def submit(*overrides):
        return slurm.main(["submit", SCRIPT, "kk_tiny_cpu", "eval.teacher=false", *run, *overrides])

    for refused in (lambda: job("resume=true", restarts=0), lambda: job("resume=true", "runs_dir=none", restarts=0)):
        with pytest.raises(
            ConfigError, match="resume=true, but .*/first does not exist .* resume=false to start a new"
        ):
            refused()
    assert submit("resume=true") == 2 and "does not exist" in capsys.readouterr().err
    for waiting in ("--dependency=afterany:41", "-d41", "--begin=20:00"):
        assert submit(waiting, "resume=true") == 0  # another job creates the folder
    assert not job(restarts=0).config.resume
    assert job(restarts=1).config.resume  # the first start left only its logs
    assert submit() == 0 and submit("resume=true") == 0
    (tmp_path / "first" / CONFIG).touch()  # no step and no checkpoint yet
    assert job(restarts=1).config.resume
    assert job("resume=true", restarts=0).config.resume
    assert submit("resume=true") == 0 and submit("--begin=20:00") == 0
    with pytest.raises(ConfigError, match="name=first: .* holds an earlier run; continue with resume=true"):
        job(restarts=0)
    capsys.readouterr()
    assert submit() == 2 and "holds an earlier run" in capsys.readouterr().err
    assert submit("name=frist", "resume=true") == 2
    assert "name=frist" in (said := capsys.readouterr().err) and "did you mean name=first?" in said
    assert submit("runs_dir=/no/such", "resume=true") == 0  # it may exist on the nodes


def test_a_rank_is_described_to_torch(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    run = config("train.gpus_per_node=8", "train.ranks_per_node=4", "teacher.ranks_per_node=2", "rollout.servers=2")
    cpus = replace(run, train=replace(run.train, gpus_per_node=0, nodes=2))
    for tasks, role, rank, expected in (  # LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE
        (place(run), "trainer", 3, ("3", "4", "4")),
        (place(run), "teacher", 1, ("5", "2", "2")),  # after the trainer's GPUs
        (place(run, only="teacher"), "teacher", 1, ("1", "2", "2")),
        (place(cpus), "trainer", 5, ("1", "8", "4")),
    ):
        world = with_role(tasks, role)
        set_rank_environment(world[rank], world, "10.0.0.1", 29500)
        described = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
        assert described == [str(rank), *expected]
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


ON_ONE_NODE = ("train.nodes=1", "train.gpus_per_node=8", "rollout.servers=2", "rollout.nodes=0")


@pytest.mark.parametrize(
    ("overrides", "before", "expected"),
    [
        (("train.ranks_per_node=4",), {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (("train.ranks_per_node=4",), {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}),
        (("train.ranks_per_node=8", "rollout.colocate=true"), {}, {}),  # servers open the ranks' memory
        (
            ("train.ranks_per_node=8", "rollout.colocate=true", "rollout.weight_transfer=shared_memory"),
            {},
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        ),
    ],
)
def test_the_allocator_is_set_before_a_device_is_touched(overrides, before, expected, monkeypatch):
    def touch():
        raise InterruptedError

    monkeypatch.setattr(os, "environ", dict(before))
    monkeypatch.setattr(local.platform, "has_cuda", lambda: True)
    monkeypatch.setattr(local.platform, "setup", touch)
    with pytest.raises(InterruptedError):
        local.run_rank("train", config(*ON_ONE_NODE, *overrides), None, Path())
    assert {name: value for name, value in os.environ.items() if "ALLOC" in name} == expected


def test_the_order_of_kernels_is_set_before_cuda_is_asked_for_anything(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    asked = []
    monkeypatch.setattr(local.platform, "has_cuda", lambda: asked.append(dict(os.environ)) or True)
    local.platform.prepare()
    assert asked == [{"CUDA_DEVICE_MAX_CONNECTIONS": "1"}]


def test_two_cudnn_libraries_are_named_with_the_remedy():
    assert local.cudnn_line([]) == ""
    assert local.cudnn_line(["/wheel/libcudnn.so.9"]) == "cuDNN: /wheel/libcudnn.so.9"
    line = local.cudnn_line(["/usr/lib/libcudnn.so.9", "/wheel/libcudnn.so.9"])
    assert "/usr/lib/libcudnn.so.9 and /wheel/libcudnn.so.9" in line and "set CUDNN_HOME" in line


def test_a_loaded_cudnn_is_found_by_its_file(tmp_path):
    library = shutil.copy(_ctypes.__file__, tmp_path / "libcudnn.so.9")
    ctypes.CDLL(str(library))
    assert str(library) in local.platform.loaded_cudnn()


RECIPE = """
from rlad_megatron.config import RunConfig, TrainConfig, ObjectiveConfig

def mine():
    return RunConfig(objective=ObjectiveConfig(name="grpo"), train=TrainConfig(steps=STEPS, gpus_per_node=0))
"""


@pytest.fixture
def recipe(tmp_path, submitted):
    """A recipe that its user edits, and its overrides."""
    file = tmp_path / "mine.py"
    overrides = [f"runs_dir={tmp_path}", "name=mine", "student.path=nobody/knows", "train.seed=3"]

    def edit(steps):
        file.write_text(RECIPE.replace("STEPS", str(steps)))
        return str(file), overrides

    return edit


def start(capsys, recipe, overrides, restarts=0, job="7"):
    """A start of a job: the configuration that its tasks read."""
    environment = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(restarts)}
    slurm.place_job(recipe, overrides, environment)
    file = capsys.readouterr().out.splitlines()[0].removeprefix("rlad-config ")
    return load_run(file, overrides)


def test_a_recipe_edited_after_its_submission_changes_nothing(recipe, submitted, capsys):
    file, overrides = recipe(steps=5)
    assert slurm.main(["submit", SCRIPT, "--nodes=1", file, *overrides]) == 0
    frozen_file = capsys.readouterr().out.strip()
    recipe(steps=6)
    first = start(capsys, frozen_file, overrides)
    assert (first.train.steps, first.train.seed) == (5, 3)
    recipe(steps=7)
    assert start(capsys, frozen_file, overrides, restarts=1) == first
    assert start(capsys, file, overrides, job="8").train.steps == 7  # another job
    assert len(list(submitted.iterdir())) == 2
    assert "commit" in Path(frozen_file).read_text().splitlines()[0]


def test_a_plain_sbatch_freezes_at_its_first_start(recipe, submitted, capsys):
    """None of our code runs at submission, so an edit while the job is queued counts; a later one does not."""
    recipe(steps=5)
    file, overrides = recipe(steps=6)
    first = start(capsys, file, overrides)
    assert first.train.steps == 6
    recipe(steps=7)
    assert start(capsys, file, overrides, restarts=1) == first
    assert start(capsys, file, overrides, restarts=2) == first
    # Job ids can repeat, and all scripts in one salloc allocation share an id.
    assert start(capsys, file, overrides).train.steps == 7
    assert (
        start(capsys, file, overrides, job="9", restarts=1).train.steps == 7
    )  # the first start failed before it froze the configuration
    assert sorted(path.name for path in submitted.iterdir()) == ["job_7.yaml", "job_9.yaml"]


def test_the_commit_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "REPOSITORY", tmp_path)
    assert frozen.code_version().startswith("commit unknown")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "kk_tiny_cpu_7.out").touch()  # a job's output is not code
    assert frozen.code_version() == f"commit {commit}"
    (tmp_path / "recipes" / "mine.py").write_text("2")
    assert frozen.code_version() == f"commit {commit} with uncommitted changes"
    (file := tmp_path / "f" / "x.yaml").parent.mkdir()
    frozen.freeze(config(), file)
    assert file.read_text().startswith("# ") and f"commit {commit} with" in file.read_text().splitlines()[0]
    assert load_run(str(file), []) == config() and list(file.parent.iterdir()) == [file]


def test_a_job_that_stops_twice_at_one_step_is_not_requeued_again(tmp_path):
    def start(restarts):
        environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(restarts)}
        job = slurm.Job.from_environment(config(f"runs_dir={tmp_path}", "name=x"), environment)
        job.folder.mkdir(parents=True)
        return job

    start(0).request_requeue(0)
    assert (tmp_path / "x/logs/job_7_0" / slurm.REQUEUE_FILE).read_text() == "0\n"
    start(1).request_requeue(4)  # with a step in between
    start(2).request_requeue(10)
    again = start(3)
    with pytest.raises(TrainingError, match="told to stop at step 10, as was the start before .* resume=true"):
        again.request_requeue(10)
    assert not (again.folder / slurm.REQUEUE_FILE).exists()
    start(4).request_requeue(10)  # after a requeue by Slurm: a node failed


@pytest.mark.parametrize(("verb", "left"), [("train", 0), ("teacher_gap", 2)])  # the gap of a run that still goes
def test_the_launcher_removes_weights_that_a_killed_rank_leaves(verb, left, tmp_path, monkeypatch):
    def killed(*_):
        raise TrainingError("rank 0 ended")

    monkeypatch.setattr(local, "Ranks", killed)
    files = possible_files(tmp_path / "x")
    try:
        for file in files:
            file.parent.mkdir(exist_ok=True)
            file.write_text("weights")
        with pytest.raises(TrainingError):
            local.run_local(verb, config(f"runs_dir={tmp_path}", "name=x", "rollout.nodes=0"))
        assert sum(file.exists() for file in files) == left
    finally:
        for file in files:
            file.unlink(missing_ok=True)


KILLED, EXITED = Ended(1, code=-9), Ended(1, code=0)
CUT_OFF, BUG = Ended(0, bug="RuntimeError: closed by peer; see log"), Ended(2, bug="KeyError: 3; see log")
SAID = Ended(0, error="a line")


@pytest.mark.parametrize(
    ("failed", "kind", "message"),
    [
        ([(True, SAID), (True, KILLED)], RladError, "a line"),
        ([(True, CUT_OFF), (True, KILLED)], TrainingError, "rank 1 ended (SIGKILL); see its output above"),
        ([(True, CUT_OFF), (True, EXITED)], TrainingError, "rank 1 ended with exit code 0 before it had finished"),
        ([(True, CUT_OFF), (True, BUG)], RankError, "rank 2 failed: KeyError: 3; see log"),
        (
            [(True, SAID), (False, KILLED)],
            TeacherError,
            "rank 1 of the teacher ended (SIGKILL); see logs/teacher_1.log",
        ),
        ([(True, SAID), (False, BUG)], RankError, "rank 2 of the teacher failed: KeyError: 3"),
    ],
)
def test_of_several_ranks_that_fail_the_cause_is_shown(failed, kind, message):
    for order in (failed, failed[::-1]):
        error = local._failure(order, Path("logs"))
        assert type(error) is kind and str(error).startswith(message)
        assert error.exit_code == (1 if kind is RankError else 2)


def test_a_rank_that_a_signal_ended_names_it():
    assert KILLED.how == "ended (SIGKILL)" and Ended(1, code=-40).how == "ended (signal 40)"


@pytest.mark.parametrize("kind", [TrainingError, KeyError, PermissionError])
def test_the_last_word_of_a_rank_fits_into_a_pipe(tmp_path, kind):
    """The launcher reads it after the rank's end, so one that does not fit is never written."""
    error = kind(13, "x" * 10**6, "y" * 10**6) if kind is PermissionError else kind("\U0001f600" * 10**6)
    assert len(pickle.dumps(_what_failed(1, error, tmp_path / "logs" / "trainer_1.log"))) < 65_000
    assert "x" * 1000 in (log := (tmp_path / "logs" / "trainer_1.log").read_text()) or "\U0001f600" * 1000 in log


def test_a_stopped_server_does_not_wait_for_orphans_that_have_ended():
    """Under a launcher that is a subreaper too: unreaped orphans look as if they were running."""
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
    folder.mkdir(parents=True)  # created by the job's placement
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


@pytest.mark.parametrize("option", ["--account=me", "--gpus-per-node=0", "--time=1:00:00"])
def test_an_option_for_jobs_is_refused_on_this_machine(option):
    options = option_parser().parse_intermixed_args(["kk_tiny_cpu", f"--python={sys.executable}", option, "--dryrun"])
    with pytest.raises(ConfigError, match=f"^{option} is for jobs; add --executor slurm"):
        check(load_run(options.recipe, options.overrides), options)


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
    """tests/slurm/test_nemo.py tests its environment and NeMo-Run."""
    monkeypatch.setenv("PATH", "")  # no sbatch
    words = ["math_r1_distill_7b_from_32b", "--executor=slurm", f"--python={sys.executable}", *words]
    options = option_parser().parse_intermixed_args(words)
    with pytest.raises(ConfigError) as caught:
        check(load_run(options.recipe, options.overrides), options)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
