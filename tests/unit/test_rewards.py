"""Rewards: the rule reward of Knights & Knaves, verified mathematics, and the registry."""

import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from pebble import CONSTS

from rlad_megatron.config import DataConfig
from rlad_megatron.data import knights_and_knaves as kk
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.rewards import math as math_reward
from rlad_megatron.rewards.overlong import punish_overlong, soft_overlong_punishment
from rlad_megatron.rewards.pool import RewardPool, score_groups
from rlad_megatron.rewards.registry import REWARDS, RewardResult, load_reward, what_is_wrong
from rlad_megatron.types import EVALUATION, Group, Prompt, Rollout

RIGHT = "(1) Zoey is a knight (2) Oliver is a knave"


def prompt(answer, text="question"):
    return Prompt(id="p", tokens=(), answer=answer, subset="all", text=text)


def score_kk(response, answer=RIGHT, text="question"):
    return load_reward("knights_and_knaves")(prompt(answer, text), response)


def score_answer(answer):
    return score_kk(f"<think> because </think> <answer> {answer} </answer>")


# --- knights and knaves ---


def test_gold_traces_earn_the_maximum():
    for puzzle in kk.generate_puzzles(DataConfig(people=(2, 3, 5), train_size=20, eval_size=0), "train"):
        result = score_kk(kk.gold_trace(puzzle), kk.answer_text(puzzle))
        assert result == RewardResult(3.0, True, {"format": 1.0, "answer": 2.0})


@pytest.mark.parametrize(
    "answer",
    [
        RIGHT,
        "\n(1) Zoey is a knight\n(2) Oliver is a knave\n",
        "Oliver is a knave, and Zoey is a knight.",
        "**Zoey** is a **Knight** and OLIVER is a KNAVE",
        "(1) Zoey: knight (2) Oliver: knave",
        "- Zoey - a knight\n- Oliver - a knave",
    ],
)
def test_right_answers(answer):
    assert score_answer(answer) == RewardResult(3.0, True, {"format": 1.0, "answer": 2.0})


@pytest.mark.parametrize(
    "answer",
    [
        "(1) Zoey is a knave (2) Oliver is a knight",
        "(1) Zoey is a knight (2) Oliver is a knight",  # one of two is still wrong
    ],
)
def test_wrong_answers(answer):
    assert score_answer(answer) == RewardResult(-0.5, False, {"format": 1.0, "answer": -1.5})


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know",
        "(1) Zoey is a knight",  # a person is missing
        "(1) Zoey is a knight (2) Emma is a knave",  # a person of another puzzle
        RIGHT + " (3) Emma is a knave",
        RIGHT + " (3) Oliver is a knight",  # both roles of one person
        "(1) Zoey is a knight (2) Oliver is a knight or a knave",
        "(1) Zoey is a knight (2) Oliver is not a knight",  # true, but not in the form asked for
        "(1) Zoey is a knight (2) Oliver is a knave, not a knight",
        "(1) Zoey is a knighthood (2) Oliver is a knave",
    ],
)
def test_unreadable_answers(answer):
    assert score_answer(answer) == RewardResult(-1.0, False, {"format": 1.0, "answer": -2.0})


@pytest.mark.parametrize(
    "response",
    [
        "",
        RIGHT,
        f"<answer> {RIGHT} </answer>",
        f"because </think> <answer> {RIGHT} </answer>",
        f"<think> because <answer> {RIGHT} </answer>",
        f"<think> because </think> {RIGHT} </answer>",
        f"<think> because </think> <answer> {RIGHT}",  # cut off
        f"<answer> {RIGHT} </answer> <think> because </think>",
        f"<think> because <answer> {RIGHT} </answer> </think>",
        f"</think> because <think> <answer> {RIGHT} </answer>",
        f"<think> because </think> </answer> {RIGHT} <answer>",
        f"<think> <think> because </think> <answer> {RIGHT} </answer>",
        f"<think> because </think> <answer> {RIGHT} </answer> <answer> {RIGHT} </answer>",
        f"<think> because </think> </think> <answer> {RIGHT} </answer>",
    ],
)
def test_wrong_format_loses_the_answer_too(response):
    assert score_kk(response) == RewardResult(-3.0, False, {"format": -1.0, "answer": -2.0})


def test_names_within_names():
    gold = "(1) Jack is a knight (2) Jackson is a knave"
    wrong = "(1) Jack is a knave (2) Jackson is a knight"
    response = "<think> </think> <answer> {} </answer>"
    assert score_kk(response.format(gold), gold).score == 3.0
    assert score_kk(response.format(wrong), gold).score == -0.5


def test_reasoning_opened_by_the_template():
    response = f"because </think> <answer> {RIGHT} </answer>"
    assert score_kk(response, text="question\nassistant <think>\n").score == 3.0
    assert score_kk("<think> " + response, text="question\nassistant <think>\n").score == -3.0


def test_unreadable_gold_answer_is_the_users_error():
    with pytest.raises(DataError, match="prompt p: answer 'yes' names no one"):
        score_kk("", answer="yes")


# --- math ---


def score_math(response, answer="42", reward="math"):
    return load_reward(reward)(prompt(answer), response).score


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"<think> 6 * 7 </think> The answer is \boxed{42}.", "42"),
        (r"\boxed{42.0}", "42"),
        (r"\fbox{42}", "42"),
        (r"\boxed{41}, no, \fbox{$42$}", "42"),
        (r"\fbox{41}, no, \boxed{42}", "42"),
        (r"\boxed{42}", r"\fbox{42}"),
        (r"\boxed{42}", "It is \\boxed{41} at first.\n#### 42"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{(1, 2)}", r"$(1,2)$"),
        (r"\boxed{1+x}", "x+1"),
        (r"First I thought \boxed{41}, but it is \boxed{42}", "42"),
        (r"<think> \boxed{41} </think> \boxed{42}", "42"),
        (r"\boxed{\frac{\sqrt{8}}{2}}", r"\boxed{\sqrt{2}}"),
    ],
)
def test_right_mathematics(response, answer):
    assert score_math(response, answer) == 1.0
    assert score_math(response, answer, "math_lenient") == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "no idea",
        r"\boxed{}",
        r"\boxed{43}",
        r"\boxed{42} or rather \boxed{43}",  # the last one counts
        r"<think> \boxed{42} </think> \boxed{43}",
        r"<think> \boxed{42} and so on",  # reasoning cut off
        r"The answer is 42. \boxed{4",  # cut off in the box
        r"The answer is 42. \fbox{43}",
        "I tried 42",  # no answer is stated
    ],
)
def test_wrong_mathematics(response):
    for reward in ("math", "math_lenient"):
        result = load_reward(reward)(prompt("42"), response)
        assert result == RewardResult(0.0, False, {"answer": 0.0})


@pytest.mark.parametrize(
    "response",
    [
        "So the answer is 42.",
        r"<think> 41? </think> The final answer is: $\frac{84}{2}$. I checked it 3 times.",
        "The answer is unclear. The final answer is 41. I hope it is correct. No, the answer is 42.",
    ],
)
def test_a_stated_answer_counts_only_for_the_lenient_reward(response):
    assert score_math(response) == 0.0
    assert score_math(response, reward="math_lenient") == 1.0


def test_endless_comparison_is_cut_off_and_wrong(monkeypatch):
    assert score_math(r"\boxed{42}") == 1.0  # math-verify is imported, and the gold answer is read
    monkeypatch.setattr(math_reward, "TIMEOUT_S", 1)
    start = time.process_time()  # no longer than the time-out's clock ran, however busy the machine
    assert score_math(r"\boxed{9^{9^{9^{9}}}}") == 0.0
    assert time.process_time() - start < 2.9


@pytest.mark.timeout(120, method="thread")  # math-verify resets SIGALRM, the default method's clock
def test_endless_reading_is_cut_off_and_wrong(monkeypatch):
    def never_done(*args, **kwargs):
        while True:
            time.sleep(0.1)

    assert score_math(r"\boxed{42}") == 1.0  # the gold answer is read and remembered
    monkeypatch.setattr(math_reward, "TIMEOUT_S", 1)
    monkeypatch.setattr("math_verify.parser.extract_target_from_pred", never_done)
    assert score_math(r"\boxed{42} ") == 0.0


def test_unreadable_gold_mathematics_is_the_users_error():
    with pytest.raises(DataError, match="prompt p: math answer"):
        score_math("42", answer=" ")


def test_math_in_a_thread_says_so_instead_of_running_without_a_timeout():
    errors = []

    def work():
        try:
            score_math(r"\boxed{42}")
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "thread" in errors[0]


# --- all ---


@pytest.mark.parametrize("name, answer", [("knights_and_knaves", RIGHT), ("math", "42"), ("math_lenient", "42")])
def test_token_soup_never_raises(name, answer):
    soup = [
        *("<think>", "</think>", "<answer>", "</answer>", "(1)", "Zoey", "Oliver", "is", "a", "knight", "knave"),
        *("\\boxed{", "}", "{", "$", "\\frac", "^", "_", "\\sqrt", "\\", "42", "1/0", "%", "(", ")", "=", ",", "\n"),
        *(
            "The answer is",
            "\\fbox{",
            "\x00",
            "\ud800",
            "é",
            "知",
            "*",
            "**",
            "[",
            "]",
            "∞",
            "-",
            "nan",
            "\\text{",
            "&",
            "#",
        ),
    ]
    rng = random.Random(0)
    reward = load_reward(name)
    for _ in range(300):
        text = rng.choice(["", " "]).join(rng.choices(soup, k=rng.randrange(30)))
        result = reward(prompt(answer), text)
        assert -3.0 <= result.score <= 3.0
        assert result.score == sum(result.parts.values())
        assert reward(prompt(answer), text) == result  # pure


@pytest.mark.timeout(60)
def test_long_text_is_quick():
    for text in ("Zoey is a " * 20000, "<think></think><answer>" + "knight " * 20000 + "</answer>", "* " * 50000):
        assert not score_kk(text).solved
    assert score_kk("<think> </think> <answer> Zoey" + " " * 20000 + "</answer>").score == -1.0
    assert score_math("(1+" * 50000) == 0.0


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_registered_rewards_load(name):
    assert callable(load_reward(name))


def test_reward_of_a_users_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def length(prompt, text):\n    return len(text)\nconstant = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("my_rewards:length")(None, "abc") == 3
    with pytest.raises(ConfigError, match="module 'my_rewards' has no function 'height'"):
        load_reward("my_rewards:height")
    with pytest.raises(ConfigError, match="has no function 'constant'"):
        load_reward("my_rewards:constant")
    sys.modules.pop("my_rewards")


@pytest.mark.parametrize("name", ["no_such_module:f", ":f", "json:", "json.nothing:loads"])
def test_modules_that_do_not_exist(name):
    with pytest.raises(ConfigError, match=r"data\.reward=.*: (cannot import|module 'json' has no function '')"):
        load_reward(name)


def test_unknown_reward_lists_what_exists():
    with pytest.raises(
        ConfigError, match="data.reward='maths' is unknown; use one of knights_and_knaves, math, .*or 'module:function'"
    ):
        load_reward("maths")


# --- the pool of processes ---

# The response is an expression: a test says what the reward does.
MODULE = """
import logging, os, subprocess, sys, time
from pathlib import Path
from rlad_megatron.rewards.registry import RewardResult

def reward(prompt, text):
    return eval(text)

def divide():
    return 1 / 0

def raise_lines():
    raise ValueError("one\\n\\ntwo")

class Tensor:
    def __float__(self):
        return 1.0

    def __repr__(self):
        return "tensor(1.,\\n 2.)"

def meet(mine, other):
    Path(mine).touch()
    while not Path(other).exists():
        time.sleep(0.01)
    return RewardResult(1, True)

def start_child(pid_file):
    process = subprocess.Popen(["sleep", "600"])
    Path(pid_file).write_text(str(process.pid))
"""
PID = "RewardResult(os.getpid(), True)"
ONE = "RewardResult(1, True)"
FAULTS = {
    "divide()": r"raised ZeroDivisionError: division by zero \(.*/my_reward\.py:\d+\)",
    "raise_lines()": "raised ValueError: one two ",
    "None": "returned None: not a RewardResult",
    "'1'": "returned '1': not a RewardResult",
    "1.0": r"returned 1\.0: not a RewardResult",
    "RewardResult(None, False)": r"returned RewardResult\(score=None.*: score must be a number from -1e\+12 to 1e\+12",
    "RewardResult('1', False)": r"returned RewardResult\(score='1'.*: score must be a number",
    "RewardResult(float('nan'), False)": r"returned RewardResult\(score=nan.*: score must be a number",
    "RewardResult(float('-inf'), False)": r"returned RewardResult\(score=-inf.*: score must be a number",
    "RewardResult(1e300, False)": "score must be a number",
    "RewardResult(10**400, False)": "score must be a number",
    "RewardResult(Tensor(), False)": r"returned RewardResult\(score=tensor\(1\., 2\.\).*score must be a number",
    "RewardResult(1, 'no')": "solved must be True or False",
    "RewardResult(1, True, [('a', 1)])": "parts must be a dict",
    "RewardResult(1, True, {'mean': 5})": "a part must not be called 'mean'",
    "RewardResult(1, True, {'solved': 5})": "a part must not be called 'solved'",
    "RewardResult(1, True, {7: 5})": "a part must not be called 7",
    "RewardResult(1, True, {'a': 1, 'b': float('nan')})": "part 'b' must be a number",
    "RewardResult(1, True, {'a': None})": "part 'a' must be a number",
    "sys.exit()": "raised SystemExit",
    "os._exit(3)": "ended its process with exit code 3",
    "os.kill(os.getpid(), 11)": "ended its process with exit code -11",
    "[os.fork() and time.sleep(1), RewardResult(1, True)][1]":  # the copy is the first to return
    r"raised OSError: a reward must not fork; use `subprocess` ",
    "time.sleep(600)": r"took more than data\.reward_timeout_s=3",
}


@pytest.fixture
def open_pool(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def open_(reward="my_reward:reward", workers=1, **fields):
        fields = {"reward_timeout_s": 120.0} | fields
        return RewardPool(DataConfig(reward=reward, reward_workers=workers, **fields), tmp_path / "run")

    return open_


def score_texts(pool, *texts):
    return pool.score([(Prompt(f"p{i}", (1,), "", "", ""), text) for i, text in enumerate(texts)])


def log_of(tmp_path):
    return (tmp_path / "run" / "logs" / "rewards.log").read_text()


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pid):
    deadline = time.monotonic() + 30
    while not is_gone(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


@pytest.mark.parametrize("text", FAULTS)
def test_a_failing_reward_is_named_and_ends_the_run(open_pool, text):
    with open_pool(reward_timeout_s=3.0) as pool, pytest.raises(DataError, match=FAULTS[text]) as caught:
        score_texts(pool, ONE, text)
    assert re.fullmatch(
        r"data\.reward .* for prompt 'p1'; fix the function, or set data\.on_reward_error=zero to score it 0",
        str(caught.value),
    )


def test_a_failing_reward_costs_the_answer(open_pool, tmp_path, capfd):
    texts = [text for fault in FAULTS for text in (fault, ONE)]
    with open_pool(reward_timeout_s=3.0, on_reward_error="zero") as pool:
        results = score_texts(pool, *texts)
        assert score_texts(pool, ONE) == [RewardResult(1.0, True)]  # the pool goes on
    assert results == [RewardResult(0.0, False), RewardResult(1.0, True)] * len(FAULTS)
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert f"{len(FAULTS)} of {len(texts)} responses score 0" in err and "ZeroDivisionError" in err and "'p0'" in err
    for place, message in enumerate(FAULTS.values()):
        assert re.search(rf"{message}.*for prompt 'p{2 * place}'\n", log_of(tmp_path)), message


@pytest.mark.parametrize("end", ["time.sleep(600)", "sum(range(10**12))", "os._exit(3)", "os._exit(0)"])
def test_a_worker_that_fails_ends_with_its_children_and_is_replaced(open_pool, tmp_path, monkeypatch, end):
    monkeypatch.setattr(CONSTS, "term_timeout", 60)  # after which pebble kills what ignores SIGTERM
    with open_pool(reward_timeout_s=2.0, on_reward_error="zero") as pool:
        start = time.monotonic()
        before, failed, after = score_texts(pool, PID, f"[start_child({str(tmp_path / 'pid')!r}), {end}]", PID)
        assert failed.score == 0 and after.score != before.score
        assert time.monotonic() - start < 30
        assert is_gone(int(before.score)) and not is_gone(int(after.score))
        wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_worker_that_dies_while_idle_is_replaced(open_pool):
    with open_pool() as pool:
        (before,) = score_texts(pool, PID)
        os.kill(int(before.score), signal.SIGKILL)
        wait_until_gone(int(before.score))
        (after,) = score_texts(pool, PID)
        assert after.score != before.score


def test_an_answer_that_arrives_as_the_pool_breaks_is_scored(open_pool):
    with open_pool() as pool:
        (before,) = score_texts(pool, PID)
        queue = pool._pool._context.task_queue
        put = queue.put

        def put_late(task):
            queue.put = put
            os.kill(int(before.score), signal.SIGKILL)
            while pool._pool.active:
                time.sleep(0.01)
            put(task)

        queue.put = put_late
        (after,) = score_texts(pool, PID)
        assert after.score != before.score


def test_workers_score_at_the_same_time_and_keep_the_order(open_pool, tmp_path):
    first, second = (str(tmp_path / name) for name in ("first", "second"))
    with open_pool(workers=2) as pool:
        meetings = score_texts(pool, f"meet({first!r}, {second!r})", f"meet({second!r}, {first!r})")
        assert [result.score for result in meetings] == [1, 1]
        numbers = [f"[time.sleep({0.05 * (i % 3 == 0)}), RewardResult({i}, {i % 2 == 0})][1]" for i in range(20)]
        assert score_texts(pool, *numbers) == [RewardResult(float(i), i % 2 == 0) for i in range(20)]


def test_workers_stay_over_calls_and_go_at_the_end(open_pool):
    with open_pool() as pool:
        pids = {int(score_texts(pool, PID)[0].score) for _ in range(3)}
        assert len(pids) == 1 and pids != {os.getpid()}
        assert score_texts(pool) == []
    assert all(is_gone(pid) for pid in pids)


def test_workers_die_with_their_parent(open_pool, tmp_path):
    script = f"""
        from pathlib import Path
        from rlad_megatron.config import DataConfig
        from rlad_megatron.rewards.pool import RewardPool
        from rlad_megatron.types import Prompt
        prompt = Prompt("p", (), "", "", "")
        with RewardPool(DataConfig(reward="my_reward:reward", reward_workers=2), Path({str(tmp_path)!r})) as pool:
            pool.score([(prompt, "meet('a', 'b')"), (prompt, "meet('b', 'a')")])
            print("ready", flush=True)
            pool.score([(prompt, "[Path('busy').touch(), time.sleep(600)]")])
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        children = psutil.Process(parent.pid).children()
        while not (tmp_path / "busy").exists():
            time.sleep(0.01)
        parent.kill()
    assert len(children) == 3  # a busy worker, an idle one, and the resource tracker of multiprocessing
    for child in children:
        wait_until_gone(child.pid)


def test_what_a_reward_prints_is_in_the_log_with_the_prompts_id(open_pool, tmp_path, capfd):
    texts = [
        "[print('a\\nb'), RewardResult(1, True)][1]",
        "[print('no newline', end=''), RewardResult(1, True)][1]",
        "[logging.warning('warned'), RewardResult(1, True)][1]",
        "[os.write(1, b'raw'), os.write(2, b'raw'), RewardResult(1, True)][-1]",
        "[subprocess.run(['echo', 'child']), RewardResult(1, True)][1]",
    ]
    with open_pool() as pool:
        assert [result.score for result in score_texts(pool, *texts)] == [1] * 5
    log = log_of(tmp_path)
    for line in ("[p0] a\n", "[p0] b\n", "[p1] no newline\n", "[p2] WARNING:root:warned\n", "rawraw", "child\n"):
        assert line in log
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name, answer", [("knights_and_knaves", RIGHT), ("math", "1/2")])
def test_scores_are_those_of_the_function(open_pool, name, answer):
    texts = ["", RIGHT, f"<think> </think> <answer> {RIGHT} </answer>", "\\boxed{0.5}", "\\boxed{2}", "\ud800"] * 3
    with open_pool(name, workers=2) as pool:
        results = pool.score([(prompt(answer), text) for text in texts])
    assert results == [load_reward(name)(prompt(answer), text) for text in texts]


def test_mathematics_beyond_the_limit_is_wrong_and_no_fault(open_pool):
    with open_pool("math", reward_timeout_s=0.5) as pool:
        assert pool.score([(prompt("42"), r"\boxed{9^{9^{9^{9}}}}")]) == [RewardResult(0.0, False)]


@pytest.mark.parametrize(
    ("module", "fault"),
    [
        ("1 / 0", r"raised ZeroDivisionError: .*my_reward\.py:1\)"),
        ("import os; os._exit(3)", "ends its process"),
        ("import time; time.sleep(600)", "ends its process"),  # after START_TIMEOUT_S
    ],
)
def test_a_reward_that_cannot_be_imported_in_the_worker(open_pool, tmp_path, monkeypatch, module, fault):
    monkeypatch.setattr("rlad_megatron.rewards.pool.START_TIMEOUT_S", 1.0)
    (tmp_path / "my_reward.py").write_text(module)
    message = rf"^data\.reward='my_reward:reward': importing it {fault}; see .*\.log$"
    with open_pool() as pool, pytest.raises(ConfigError, match=message):
        score_texts(pool, ONE)


def test_workers_import_no_torch():
    modules = {name.partition(":")[0] for name in REWARDS.values()}
    modules |= {"rlad_megatron.cli", "rlad_megatron.launch.slurm"}  # multiprocessing imports the main module
    code = f"import sys; import rlad_megatron.rewards.worker, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "math_verify" in loaded and not {"torch", "numpy", "megatron", "vllm", "transformers"} & set(loaded)


@pytest.mark.parametrize(
    ("bound", "slurm", "ranks", "expected"),
    [(64, None, 8, 8), (2, None, 4, 1), (8, "64", 8, 8), (16, "16", 4, 4), (64, "16", 4, 4)],
)
def test_default_number_of_workers(open_pool, monkeypatch, tmp_path, bound, slurm, ranks, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(bound)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    if slurm:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", slurm)
    assert RewardPool(DataConfig(), tmp_path, ranks).size == expected
    assert RewardPool(DataConfig(reward_workers=3), tmp_path, ranks).size == 3


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    for result in (RewardResult(numpy.float32(1), numpy.bool_(True), {"a": numpy.int64(3)}), RewardResult(True, False)):
        assert what_is_wrong(result) is None
    assert "score" in what_is_wrong(RewardResult(numpy.ones(1), True))


def test_scores_are_written_into_the_rollouts(open_pool):
    rollouts = [Rollout(Prompt("p", (1,), "", "", ""), [i], [-1.0], "stop", [(0, 1)]) for i in range(2)]
    tokenizer = SimpleNamespace(decode=lambda ids: f"RewardResult({ids[0]}, True, {{'part': {ids[0]}}})")
    with open_pool() as pool:
        score_groups([Group(1, 0, rollouts[:1]), Group(1, 1, rollouts[1:])], tokenizer, pool)
    assert [(r.reward, r.solved, r.reward_parts) for r in rollouts] == [(0, True, {"part": 0}), (1, True, {"part": 1})]
    assert rollouts[1].text == "RewardResult(1, True, {'part': 1})"


def test_the_soft_overlong_punishment_is_dapos_equation_13():
    longest, buffer = 100, 20

    def equation(length):
        if length <= longest - buffer:
            return 0.0
        return ((longest - buffer) - length) / buffer if length <= longest else -1.0

    for length in (0, 79, 80, 81, 90, 100, 101):
        assert soft_overlong_punishment(length, longest, buffer) == pytest.approx(equation(length))


def test_overlong_training_responses_lose_reward_and_others_do_not():
    def group(number):
        rollouts = [Rollout(prompt(""), [1] * length, [], "stop", [], reward=2.0) for length in (5, 9)]
        return Group(number, 0, rollouts)

    trained, held_out = group(3), group(EVALUATION)
    punish_overlong([trained, held_out], 10, 4)
    assert [rollout.reward for rollout in trained.rollouts] == [2.0, 1.25]
    assert [rollout.reward_parts for rollout in trained.rollouts] == [{"overlong": 0.0}, {"overlong": -0.75}]
    assert [rollout.reward for rollout in held_out.rollouts] == [2.0, 2.0]


def test_a_module_that_fails_at_import_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("undefined\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"data.reward='broken_reward:f': cannot import .*NameError: .*undefined"):
        load_reward("broken_reward:f")
