"""The `rlad` command before a rank starts, and when it is interrupted."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import rlad_megatron
from rlad_megatron.cli import main


@pytest.mark.parametrize("command", ["train", "sft", "evaluate", "plan", "bench", "show"])
def test_only_the_recipe_is_required(command, capsys):
    with pytest.raises(SystemExit):
        main([command])
    said = f"rlad: the following arguments are required: RECIPE; `rlad {command} --help` describes it\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "invalid choice: 'shwo'"),
        (["recipes", "x"], "unrecognized arguments: x"),
        (["bench", "kk_tiny_cpu", "--steps=0"], "argument --steps: 0; use at least 1"),
        (["convert", "hf-to-megatron", "a", "b", "--tp=x"], "invalid int value: 'x'; `rlad convert hf-to-megatron --h"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith("rlad: ") and said.count("\n") == 1 and message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "kk_tiny_cpu", "--teacher-gap", "objective.name=grpo"], "objective.name=grpo has no teacher"),
        (["bench", "kk_tiny_cpu", "--teacher-only", "objective.name=grpo"], "no teacher to measure; leave out --teach"),
        (
            ["bench", "kk_tiny_cpu", "--servers-only", "eval.teacher=false", "rollout.urls=[http://127.0.0.1:9]"],
            "rollout.urls: the run starts no servers to measure; leave out --servers-only",
        ),
        (
            ["plan", "kk_tiny_cpu", "--bench", "none.json"],
            "--bench=none.json is no file of `rlad bench`; make one with",
        ),
        (
            ["plan", "kk_tiny_cpu", "--responses=97"],
            "--responses=97: a run on CPUs (train.gpus_per_node=0) has no time",
        ),
        (["bench", "kk_tiny_cpu", "profile.steps=[5]"], "profile.steps=[5]: the run ends after step 4 (train.steps)"),
        (
            ["show", "kk_tiny_cpu", "profile.steps=[5]", "profile.ranks=[2]"],
            "profile.ranks=[2]: the trainer's ranks are 0 to 1",
        ),
        (["show", "kk_tiny_cpu", "profile.ranks=[0]"], "profile.ranks=[0] has no effect without profile.steps"),
        (["show", "kk_tiny_cpu", "--steps", "3"], "'--steps' is not an override; write key=value"),
        (["show", "kk_tiny_cpu", "--train.steps=3"], "did you mean 'train.steps'?"),
    ],
)
def test_what_follows_an_option_is_an_override(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


STUDENT = Path(__file__).parents[2] / "recipes" / "assets" / "kk_tiny_student"


def test_data_shows_what_a_run_would_see(tmp_path, capsys):
    names = ["Zoey", "Oliver", "Emma"]
    said = [f"{a} says {b} is a {role} ." for a in names for b in names for role in ("knight", "knave")]
    rows = [{"question": text, "answer": f"#### {i}", "subset": "ab"[i % 2]} for i, text in enumerate(said)]
    rows = [rows[1], {"question": " ".join(["Zoey"] * 50), "answer": "####", "subset": "b"}, *rows, rows[0]]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["data.columns.prompt=question", "data.reward=math", "data.prompt_style=plain", "data.max_prompt_tokens=40"]
    lengths = ["rollout.sampling.max_tokens=96", "eval.sampling.max_tokens=96"]
    assert main(["data", str(file), f"student.path={STUDENT}", *words, *lengths]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train +│ 18 +│ 17 +│ 1 +│ 1 ", out), "one is too long, one is there twice"
    assert re.search(r"test +│ 2 ", out) and re.search(r"  b +│ 1", out)
    assert "Not trained on, because they are held out too: 1 prompts." in out
    assert "Longest prompt that fits: 40 tokens (data.max_prompt_tokens=40)." in out
    assert "data.jsonl:2: data.reward=math cannot read the answer '####'" in out
    assert out.count("answer: ####") == 3 and "Zoey says Zoey is a knave ." in out
    assert "too long" in out.split("Tokens of train prompts")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing_there"], "'nothing_there' is neither a recipe nor data; give a recipe (kk_"),
        (["gsm8k"], "student.path is empty; name a model that counts tokens: rlad data gsm8k student.path=..."),
        (["kk_tiny_cpu", "data.source=own.jsonl"], "data.reward=auto: data.source=own.jsonl has no reward of its own"),
    ],
)
def test_data_of_nothing(arguments, message, capsys):
    assert main(["data", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rlad: {message}") and said.count("\n") == 1


@pytest.mark.parametrize("command", ["show", "plan"])
def test_a_reader_may_leave(command):
    """As `head` does."""
    words = [sys.executable, "-m", "rlad_megatron.cli", command, "kk_tiny_cpu"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"rlad {rlad_megatron.__version__}\n"
    assert rlad_megatron.__version__ == version("rlad-megatron")


def test_the_readme_quotes_what_a_plan_prints(capsys):
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    arguments = readme.partition("$ rlad plan ")[2].split()[:2]
    assert main(["plan", *arguments]) == 2
    assert f"$ rlad plan {' '.join(arguments)} {capsys.readouterr().err.strip()} " in readme


def test_show_prints_no_configuration_that_a_run_would_refuse(capsys):
    assert main(["show", "kk_tiny_cpu", "objective.alpha=7"]) == 2
    assert capsys.readouterr() == ("", "rlad: objective.alpha=7 is outside [0, 1]\n")


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupted_run_says_how_to_go_on(begun, tmp_path, monkeypatch, capsys):
    def interrupted(verb, config):
        if begun:
            (config.run_dir / "config.yaml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("rlad_megatron.launch.local.run_local", interrupted)
    overrides = ["objective.name=cross_entropy", "data.train_size=64", f"runs_dir={tmp_path}", "name=my run"]
    assert main(["sft", "kk_tiny_cpu", *overrides]) == 130
    go_on = f"continue with: rlad sft '{tmp_path}/my run/config.yaml' resume=true"
    assert capsys.readouterr().err == f"rlad: interrupted; {go_on if begun else 'start it again'}\n"


def test_a_start_does_not_import_torchs_checkpoints():
    """They would take 0.7 s before any rank starts."""
    imported = "import sys; from rlad_megatron.launch import local, preflight"
    code = f"{imported}; sys.exit('torch.distributed.checkpoint' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
