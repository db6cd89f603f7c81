"""The `rlad` command before a rank starts, and when it is interrupted."""

from importlib.metadata import version

import pytest

import rlad_megatron
from rlad_megatron.cli import main


@pytest.mark.parametrize("command", ["train", "sft", "evaluate", "plan", "show"])
def test_only_the_recipe_is_required(command, capsys):
    with pytest.raises(SystemExit):
        main([command])
    assert capsys.readouterr().err.endswith("the following arguments are required: RECIPE\n")


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"rlad {rlad_megatron.__version__}\n"
    assert rlad_megatron.__version__ == version("rlad-megatron")


def test_show_prints_no_configuration_that_a_run_would_refuse(capsys):
    assert main(["show", "kk_tiny_cpu", "objective.alpha=7"]) == 2
    assert capsys.readouterr() == ("", "rlad: objective.alpha=7.0 is outside [0, 1]\n")


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupted_run_says_how_to_go_on(begun, tmp_path, monkeypatch, capsys):
    def interrupted(verb, config):
        if begun:
            config.run_dir.mkdir(parents=True)
            (config.run_dir / "config.yaml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("rlad_megatron.launch.local.run_local", interrupted)
    overrides = ["objective.name=cross_entropy", "data.train_size=64", f"runs_dir={tmp_path}", "name=my run"]
    assert main(["sft", "kk_tiny_cpu", *overrides]) == 130
    go_on = f"go on with: rlad sft '{tmp_path}/my run/config.yaml' resume=true"
    assert capsys.readouterr().err == f"rlad: interrupted; {go_on if begun else 'start it again'}\n"
