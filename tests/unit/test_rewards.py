"""Rewards: the rule reward of Knights & Knaves, verified mathematics, and the registry."""

import random
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from rlad_megatron.config import DataConfig
from rlad_megatron.data import knights_and_knaves as kk
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.rewards import math as math_reward
from rlad_megatron.rewards.registry import REWARDS, RewardResult, load_reward, score_responses
from rlad_megatron.types import Prompt, Rollout

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
    start = time.monotonic()
    assert score_math(r"\boxed{9^{9^{9^{9}}}}") == 0.0
    assert time.monotonic() - start < 2.9


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


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompt, text: 1 / 0, r"data\.reward raised ZeroDivisionError: .*'p7' \(.*test_rewards\.py:\d+\)"),
        (lambda prompt, text: 1.0, r"data\.reward returned 1\.0 for prompt 'p7'"),
        (lambda prompt, text: RewardResult(float("nan"), False), "finite score"),
    ],
)
def test_a_reward_that_fails_is_named(reward, message):
    rollout = Rollout(Prompt("p7", (1,), "", "", ""), [1], [-1.0], "stop", 0)
    with pytest.raises(DataError, match=message):
        score_responses([rollout], SimpleNamespace(decode=str), reward)


@pytest.mark.parametrize("name", ["no_such_module:f", ":f", "json:", "json.nothing:loads"])
def test_modules_that_do_not_exist(name):
    with pytest.raises(ConfigError, match=r"data\.reward=.*: (cannot import|module 'json' has no function '')"):
        load_reward(name)


def test_unknown_reward_lists_what_exists():
    with pytest.raises(
        ConfigError, match="data.reward='maths' is unknown; use one of knights_and_knaves, math, .*or 'module:function'"
    ):
        load_reward("maths")
