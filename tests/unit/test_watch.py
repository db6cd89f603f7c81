"""`rlad watch`: advisories, files that another process writes, and what the server answers to whom."""

import json

import pytest
from fake_run import HOSTILE, config_of, fake_run, rollout_line, write_rollout_file
from starlette.testclient import TestClient

from rlad_megatron.cli import main
from rlad_megatron.config.recipe import apply_overrides, to_yaml
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.observe.advisories import advisories
from rlad_megatron.observe.metrics import MetricsWriter
from rlad_megatron.observe.rollout_index import Filter, RolloutIndex
from rlad_megatron.observe.rollouts import drop_rollouts_after
from rlad_megatron.observe.run_folder import RunFolder, ServerLoad
from rlad_megatron.observe.tail import Tail
from rlad_megatron.observe.timeline import Timeline
from rlad_megatron.watch.server import MOST_ROWS, application, check_folder, watch

# ---------------------------------------------------------------- advisories


def steps_of(key, values):
    return [{"step": step, key: value} for step, value in enumerate(values, start=1)]


def about(metrics, *overrides, disk=None, tmp_path=None):
    config = None if tmp_path is None else apply_overrides(config_of(tmp_path), list(overrides))
    return {advisory.key: advisory.text for advisory in advisories(metrics, config, disk)}


# The metric, values without the advisory, values with it: each just on one side of the rule's bound.
RULES = {
    "slow": ("time/step", [2.0] * 9 + [11.9], [2.0] * 9 + [12.0]),
    "flat": ("rollout/trained_fraction", [0.1] * 10 + [0.5] * 10, [1.0] * 10 + [0.49] * 10),
    "cut": ("rollout/cut_fraction", [0.9] * 10 + [0.25] * 10, [0.0] * 10 + [0.26] * 10),
    "clamp": ("trrd/clamp_fraction", [1.0] * 10 + [0.9] * 10, [0.0] * 10 + [0.91] * 10),
    "mismatch": ("mismatch/abs_mean", [1e-4] * 10 + [2.9e-4] * 10, [1e-4] * 10 + [3.1e-4] * 10),
}
FP32 = ("student.precision=fp32", "rollout.dtype=float32")


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_by_hand(rule, tmp_path):
    key, without, within = RULES[rule]
    assert about(steps_of(key, without), *FP32, tmp_path=tmp_path) == {}
    assert list(about(steps_of(key, within), *FP32, tmp_path=tmp_path)) == [rule]
    assert about(steps_of(key, [float("nan")] * 20), *FP32, tmp_path=tmp_path) == {}


def test_a_rising_mismatch_is_no_rounding_and_no_lag(tmp_path):
    def rises(first, recent, *overrides):
        found = about(steps_of("mismatch/abs_mean", [first] * 10 + [recent] * 10), *overrides, tmp_path=tmp_path)
        return "mismatch" in found

    assert not rises(1e-7, 4e-7, *FP32) and not rises(0.0, 0.0, *FP32) and not rises(3e-5, 9.9e-5, *FP32)
    assert rises(3e-5, 1.01e-4, *FP32)
    assert not rises(0.006, 0.0199) and rises(0.006, 0.0201), "bf16"
    ahead = ("rollout.schedule=ahead", "objective.mismatch_correction=icepop")
    assert not rises(3e-5, 1e-2, *FP32, *ahead)


def test_a_slow_step_is_told_with_its_longest_phase():
    metrics = [{"step": step, "time/step": 2.0, "time/rollout": 1.0} for step in range(1, 12)]
    metrics[4] |= {"time/step": 13.0}
    metrics[7] |= {"time/step": 20.0, "time/rollout": 3.0, "time/weight_sync": 15.0, "time/eval": 99.0}
    (text,) = about(metrics).values()
    assert "Step 8 took 20.0 s, 10.0 times the median of 2.0 s, 15.0 s of it in weight_sync" in text
    assert "; 1 earlier step was slow too;" in text
    assert about(metrics[:4]) == {}, "four steps have no median to speak of"


def test_the_probe_is_held_against_the_bound_of_its_precision(tmp_path):
    for value, told in ((4.9e-4, False), (5.1e-4, True)):
        assert bool(about(steps_of("sync/probe_abs_max", [value]), *FP32, tmp_path=tmp_path)) is told
    # In bf16 5 times the first level, which is at least 0.02: 0.1, and of 0.04 it is 0.2. Told from half of that on.
    for values, told in (([0.001, 0.049], False), ([0.001, 0.051], True), ([0.04, 0.09], False), ([0.04, 0.11], True)):
        found = about(steps_of("sync/probe_abs_mean", values), "rollout.mismatch_factor=5", tmp_path=tmp_path)
        assert list(found) == (["probe"] if told else [])
    assert about(steps_of("sync/probe_abs_max", [1.0])) == {}, "without its configuration nothing is known"


@pytest.mark.parametrize(
    ("free", "total", "told"), [(49e9, 1e12, True), (51e9, 1e12, False), (99e9, 1e14, True), (101e9, 1e14, False)]
)
def test_a_disk_is_nearly_full_below_a_share_and_a_size(free, total, told):
    assert list(about([], disk=(int(free), int(total)))) == (["disk"] if told else [])


# ---------------------------------------------------------------- files that grow


def test_each_whole_line_is_read_once(tmp_path):
    tail = Tail(tmp_path / "file")
    assert tail.poll() == [] and tail.restarts == 0, "not there yet"
    with tail.path.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        assert tail.poll() == [b"one"]
        assert tail.poll() == [], "a cut line is waited for"
        file.write(b"o\n\nfour\n")
        assert tail.poll() == [b"two", b"", b"four"]
    assert tail.restarts == 0


@pytest.mark.parametrize("how", ["replaced", "replaced twice", "shortened", "removed"])
def test_a_file_that_starts_again_is_read_again(tmp_path, how):
    tail = Tail(tmp_path / "file")
    tail.path.write_text("one\ntwo\n")
    tail.poll()
    if how.startswith("replaced"):  # by one of the same length; twice: file systems reuse inodes
        for _ in how.split():
            (tmp_path / "new").write_text("ONE\nTWO\n")
            (tmp_path / "new").rename(tail.path)
    elif how == "shortened":
        tail.path.write_text("one\n")
    else:
        tail.path.unlink()
        assert tail.poll() == [] and tail.restarts == 1
        tail.path.write_text("new\n")
    first = {"shortened": b"one", "removed": b"new"}.get(how, b"ONE")
    assert tail.poll()[0] == first and tail.first == 1 and tail.restarts == 1


def test_a_resumed_run_is_sent_from_its_start(tmp_path):
    folder = RunFolder(tmp_path)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss/policy": step / 3})
        folder.poll()
        news = folder.news(0, 0, None)
        assert (news["count"], news["metrics"]) == (3, {"step": [1, 2, 3], "loss/policy": [0.33333, 0.66667, 1]})
        writer.write(4, {"grad_norm": float("nan")})
        folder.poll()
        news = folder.news(news["count"], news["restarts"], None)
        assert (news["after"], news["metrics"]) == (3, {"step": [4], "grad_norm": [None]})
        writer.truncate_after(1)
        writer.write(2, {"loss/policy": 7.0})
    folder.poll()
    news = folder.news(news["count"], news["restarts"], None)
    assert (news["after"], news["metrics"]["step"], news["restarts"]) == (0, [1, 2], 1)


def test_a_line_that_is_no_json_is_named(tmp_path):
    metrics, load = tmp_path / "metrics.jsonl", tmp_path / "timeline" / "server_0.jsonl"
    folder = RunFolder(tmp_path)
    load.parent.mkdir()
    for path, good, bad, message in (
        (metrics, '{"step": 1}', "nonsense", "is not JSON"),
        (metrics, '{"step": 1}', "[1]", "is not JSON"),
        (metrics, '{"step": 1}', '{"step": "2"}', "is not JSON"),
        (load, '{"time": 1, "value": 2}', "5", "is no event"),
        (load, '{"time": 1, "value": 2}', "ti", "is no event"),
    ):
        path.write_text(f"{good}\n")
        folder.poll()
        with path.open("a") as file:
            file.write(f"{good}\n{bad}\n")
        for _ in range(2):  # it stays an error, with the right number
            with pytest.raises(DataError, match=rf"{path.name}, line 3 {message}.*; remove the line"):
                folder.poll()
            with path.open("a") as file:
                file.write(f"{good}\n")
        path.write_text(f"{good}\n")
        folder.poll()
    assert folder.news(0, 0, None)["count"] == 1


def test_the_load_of_a_server_is_a_step_curve(tmp_path):
    file = tmp_path / "timeline" / "server_0.jsonl"
    timeline = Timeline(tmp_path)
    timeline.count("server 0", "responses in flight", 4)
    timeline.write(1)
    lines = [
        {"row": "server 0", "step": 2, "name": "responses in flight"} | {"time": t, "value": v}
        for t, v in ((1000.0, 0), (2000.0, 9), (2000.5, 3), (4000.0, 0))
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"row": "ser')
    load = ServerLoad(file)
    assert load.poll() and not load.poll()
    curve = load.curve()
    points = dict(zip(curve["times"], curve["values"], strict=True))
    assert points[1000.0] == 0 and points[2000.0] == 9 and points[2010.0] == 3 and points[4000.0] == 0


# ---------------------------------------------------------------- the list of rollouts


def numbers(index, start=0, size=100, **wanted):
    found, rows = index.page(Filter(**wanted), start, size)
    return found, [(row["step"], row["number"]) for row in rows]


def test_rollouts_are_found_by_step_result_subset_and_text(tmp_path):
    for step in (1, 2, 10):
        write_rollout_file(tmp_path, step, [rollout_line(step, number) for number in range(3)])
    write_rollout_file(tmp_path, 3, [HOSTILE | {"step": 3, "prompt": "ÉTÉ"}])
    index = RolloutIndex(tmp_path)
    index.poll()
    assert index.count == 10 and index.subsets == ["PPL2", "PPL3"]
    assert numbers(index, size=4) == (10, [(10, 0), (10, 1), (10, 2), (3, 0)])
    assert numbers(index, start=8) == (10, [(1, 1), (1, 2)])
    assert numbers(index, step=2) == (3, [(2, 0), (2, 1), (2, 2)])
    assert numbers(index, solved=False) == (4, [(10, 0), (3, 0), (2, 0), (1, 0)])
    assert numbers(index, subset="PPL3", solved=True) == (3, [(10, 1), (2, 1), (1, 1)])
    assert numbers(index, text="ANSWER 2") == (3, [(10, 2), (2, 2), (1, 2)])
    assert numbers(index, text="été") == (1, [(3, 0)])
    assert numbers(index, subset="")[0] == 0, "those without one"
    write_rollout_file(tmp_path, 11, [rollout_line(11, 2)])
    index.poll()
    assert numbers(index, text="answer 2") == (4, [(11, 0), (10, 2), (2, 2), (1, 2)])


def test_a_rollout_file_is_read_again_when_it_changes(tmp_path):
    file = write_rollout_file(tmp_path, 1, [rollout_line(1, 0)])
    whole = file.read_text() + json.dumps(rollout_line(1, 1)) + "\n"
    file.write_text(whole[:-20])
    index = RolloutIndex(tmp_path)
    index.poll()
    assert numbers(index, text="answer") == (1, [(1, 0)])
    file.write_text(whole)
    index.poll()
    assert numbers(index, text="answer") == (2, [(1, 0), (1, 1)])
    file.unlink()
    index.poll()
    assert index.count == 0


def test_a_resumed_run_has_other_rollouts_of_the_same_number(tmp_path):
    for step in range(1, 9):
        write_rollout_file(tmp_path, step, [rollout_line(step, 0)])
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n')
    folder.poll()
    before = folder.news(0, 0, None)
    drop_rollouts_after(tmp_path, 3)
    assert len(list((tmp_path / "rollouts").iterdir())) == 3
    for step in range(4, 9):
        write_rollout_file(tmp_path, step, [rollout_line(step, 0, response="again")])
    (tmp_path / "metrics.jsonl.tmp").write_text('{"step": 8}\n')
    (tmp_path / "metrics.jsonl.tmp").rename(tmp_path / "metrics.jsonl")
    folder.poll()
    after = folder.news(0, 0, None)
    assert before["rollouts"] == after["rollouts"] == 8 and before["rollouts_version"] < after["rollouts_version"]
    assert numbers(folder.rollouts, text="again") == (5, [(step, 0) for step in (8, 7, 6, 5, 4)])
    folder.poll()
    assert folder.news(0, 0, None)["rollouts_version"] == after["rollouts_version"]


def test_a_file_that_cannot_be_read_is_left_out_and_told(tmp_path):
    for step in range(1, 9):
        write_rollout_file(tmp_path, step, [rollout_line(step, 0)])
    bad = {1: "nonsense", 2: "[1]", 3: '{"step": 3}', 4: json.dumps(rollout_line(4, 0)).replace("[-0.1,", "[-0.1 x,")}
    for step, line in bad.items():
        file = write_rollout_file(tmp_path, step, [rollout_line(step, 0)])
        file.write_text(f"{file.read_text()}{line}\n")
    folder = RunFolder(tmp_path)
    folder.poll()
    assert numbers(folder.rollouts)[0] == 6 and len(folder.rollouts.problems) == 3
    assert "step_00000001.jsonl, line 2 is no rollout (" in folder.news(0, 0, None)["advisories"][0]
    assert folder.rollouts.get("step_00000004.jsonl", 0)["id"] == "kk/4/0"
    assert folder.rollouts.get("step_00000004.jsonl", 1) is None, "its figures are not read before they are shown"
    folder.poll()
    assert numbers(folder.rollouts)[0] == 4 and len(folder.rollouts.problems) == 4
    write_rollout_file(tmp_path, 4, [rollout_line(4, 0)])
    folder.rollouts.poll(all_files=True)
    assert numbers(folder.rollouts)[0] == 5


def test_a_look_at_many_rollouts_takes_a_bounded_time(tmp_path):
    for step in range(1, 9):
        write_rollout_file(tmp_path, step, [rollout_line(step, number) for number in range(step)])
    index = RolloutIndex(tmp_path)
    index.poll(seconds=-1.0)
    assert numbers(index)[1][0] == (8, 0) and index.count == 8 + 7 + 6
    index.poll()
    assert index.count == 36 and [row["tokens"] for row in index.page(Filter(), 0, 1)[1]] == [3]
    some = RolloutIndex(tmp_path, steps=3)
    some.poll()
    assert {step for step, _ in numbers(some)[1]} == {1, 5, 8}


def test_only_listed_files_are_read(tmp_path):
    (tmp_path / "secret.jsonl").write_text("{}\n")
    file = write_rollout_file(tmp_path, 1, [rollout_line(1, 0)])
    index = RolloutIndex(tmp_path)
    index.poll()
    assert index.get(file.name, 0)["id"] == "kk/1/0"
    for name, number in (("../secret.jsonl", 0), (str(tmp_path / "secret.jsonl"), 0), (file.name, 1), (file.name, -1)):
        assert index.get(name, number) is None


# ---------------------------------------------------------------- the server


@pytest.fixture
def client(tmp_path):
    run_dir = tmp_path / "my_run"
    run_dir.mkdir()
    return TestClient(application(run_dir, "secret"), base_url="http://127.0.0.1:8470/secret/"), run_dir


START = {"after": 0, "restarts": 0, "load": -1}


def ask(client, path, code=200, **query):
    answer = client.get(path, params=query)
    assert answer.status_code == code, answer.text
    return answer


def test_a_run_that_has_not_begun_goes_on_and_ends(client):
    client, run_dir = client
    answer = ask(client, "news", **START).json()
    assert answer["facts"]["state"] == "not begun" and answer["news"]["count"] == 0
    (run_dir / "lock").write_text("{}")
    (run_dir / "config.yaml").write_text(to_yaml(apply_overrides(config_of(run_dir), ["train.steps=3"])))
    fake_run(run_dir)
    answer = ask(client, "news", **START).json()
    assert answer["facts"]["state"] == "running" and answer["facts"]["age"].endswith(" s ago")
    assert answer["news"]["count"] == 5 and answer["news"]["rollouts"] == 10
    (run_dir / "lock").unlink()
    seen = {"after": 5, "restarts": 0, "load": answer["news"]["load_version"]}
    seen["config"] = answer["facts"]["config_version"]
    assert ask(client, "news", **seen).json()["facts"]["state"] == "stopped", "perhaps its export failed"
    (run_dir / "report.html").touch()
    answer = ask(client, "news", **seen).json()
    assert answer["facts"]["state"] == "ended"
    assert answer["news"]["metrics"] == {} and answer["news"]["load"] is answer["facts"]["config"] is None, "as it was"
    (run_dir / "config.yaml").write_text(to_yaml(apply_overrides(config_of(run_dir), ["train.steps=40"])))
    answer = ask(client, "news", **seen).json()
    assert answer["facts"]["state"] == "stopped" and "steps: 40" in answer["facts"]["config"], "it goes on"


def test_a_configuration_of_another_version_does_not_hide_the_figures(client):
    client, run_dir = client
    fake_run(run_dir)
    (run_dir / "config.yaml").write_text("no_such_field: 1\n")
    answer = ask(client, "news", **START).json()
    assert "no_such_field" in answer["facts"]["state"] and answer["news"]["count"] == 5


def test_what_cannot_be_read_is_told_and_is_no_wrong_address(client, monkeypatch):
    client, run_dir = client
    (run_dir / "metrics.jsonl").write_text("[1]\n")
    assert "metrics.jsonl, line 1 is not JSON" in ask(client, "news", 500, **START).text
    ask(client, "news", 404, after=0, restarts="x", load=0)
    monkeypatch.setattr(RunFolder, "poll", lambda folder, seconds: {}["a mistake of ours"])
    with pytest.raises(KeyError):
        ask(client, "news", **START)


def test_rollouts_come_in_pages(client):
    client, run_dir = client
    write_rollout_file(run_dir, 1, [rollout_line(1, number) for number in range(300)])
    ask(client, "news", **START)
    answer = ask(client, "rollouts", start=0, size=10**6, solved="true", text="", step="").json()
    assert answer["found"] == 299 and len(answer["rows"]) == MOST_ROWS
    row = answer["rows"][4]
    assert ask(client, "rollout", file=row["file"], number=row["number"]).json()["id"] == "kk/1/5"
    ask(client, "rollout", 404, file="../../lock", number=0)
    for wrong in ({"start": "x", "size": 1}, {}, {"start": 0, "size": 1, "step": "1.5"}):
        ask(client, "rollouts", 404, **wrong)


def test_only_the_page_is_served_and_only_to_this_machine(client):
    client, run_dir = client
    (run_dir / "config.yaml").write_text("x: 1")
    page = ask(client, "")
    assert "script-src 'self'; connect-src 'self'" in page.headers["Content-Security-Policy"]
    assert page.headers["Referrer-Policy"] == "no-referrer" and '<script src="static/page.js">' in page.text
    assert ask(client, "static/page.css").headers["content-type"].startswith("text/css")
    assert "Plotly" in ask(client, "static/plotly.min.js").text
    for path in ("config.yaml", "static/config.yaml", "static/__init__.py", "static/..%2f__init__.py", "metrics.jsonl"):
        ask(client, path, 404)
    assert client.get("http://127.0.0.1:8470/").status_code == 404, "without the secret"
    assert client.get("http://127.0.0.1:8470/news?after=0&restarts=0&load=0").status_code == 404
    for method in ("post", "put", "delete"):
        assert getattr(client, method)("news").status_code == 405
    for host, code in (
        ("localhost:9000", 200),
        ("127.0.0.1", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
    ):
        assert client.get("", headers={"Host": host}).status_code == code, host


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    check_folder(tmp_path / "to_come")
    for before_its_run in ("evaluate/logs", "generate", "bench", "wandb"):
        (tmp_path / "kk" / before_its_run).mkdir(parents=True)
    (tmp_path / "kk" / "lock").touch()
    check_folder(tmp_path / "kk")
    (tmp_path / "kk" / "config.yaml").touch()
    for path, message in (
        (tmp_path, f"RUN={tmp_path}: holds no run but folders of runs; give one of them: kk"),
        (tmp_path / "no" / "such", "no such folder"),
        (tmp_path / "kk" / "lock", "no such folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_folder(path)
    assert main(["watch", str(tmp_path / "no" / "such")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_port_that_is_taken_is_named(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port={port}: cannot listen on 127.0.0.1 .*; use another port"):
            watch(tmp_path, port)
