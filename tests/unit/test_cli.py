"""The `rlad` command before a rank starts, and when it is interrupted."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import rlad_megatron
from rlad_megatron.cli import main


@pytest.mark.parametrize("command", ["train", "sft", "evaluate", "plan", "show"])
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
        (["show", "kk_tiny_cpu", "--steps", "3"], "'--steps' is not an override; write key=value"),
        (["show", "kk_tiny_cpu", "--train.steps=3"], "did you mean 'train.steps'?"),
    ],
)
def test_what_follows_an_option_is_an_override(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


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
