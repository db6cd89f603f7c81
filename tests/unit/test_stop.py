"""SIGINT and SIGTERM: the first asks, the second ends."""

import os
import signal

import pytest

from rlad_megatron.cli import main
from rlad_megatron.launch.stop import Interrupted, stop_signals

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers():
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    before = [signal.getsignal(number) for number in BOTH]
    yield
    assert [signal.getsignal(number) for number in BOTH] == before
    signal.signal(signal.SIGINT, found)


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("second", BOTH)
@pytest.mark.parametrize("first", BOTH)
def test_the_first_asks_and_the_second_ends(first, second):
    asked = []
    with pytest.raises(Interrupted) as caught, stop_signals(lambda: asked.append(1) or True) as signals:
        assert signals.first is None
        send(first)
        assert asked == [1] and signals.first == first
        try:
            send(second)
        finally:
            for number in BOTH:
                send(number)  # nothing interrupts the clean-up
    assert asked == [1] and caught.value.signum == second


def test_what_cannot_stop_by_itself_ends_at_the_first():
    with pytest.raises(Interrupted), stop_signals():
        send(signal.SIGTERM)


def test_an_ignored_sigint_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals():
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on_and_reports_the_signal(signum, code, tmp_path, monkeypatch, capsys):
    def run_local(verb, config):
        (config.run_dir / "config.yaml").touch()
        with stop_signals():
            send(signum)

    monkeypatch.setattr("rlad_megatron.launch.local.run_local", run_local)
    words = ["objective.name=cross_entropy", "data.train_size=64", f"runs_dir={tmp_path}", "name=a"]
    assert main(["sft", "kk_tiny_cpu", *words]) == code
    config = tmp_path / "a" / "config.yaml"
    assert capsys.readouterr().err == f"rlad: interrupted; continue with: rlad sft {config} resume=true\n"


def test_a_signal_during_the_checks_leaves_no_lock(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rlad_megatron.launch.preflight.check_sft", lambda config: send(signal.SIGTERM))
    words = ["objective.name=cross_entropy", "data.train_size=64", f"runs_dir={tmp_path}", "name=a"]
    assert main(["sft", "kk_tiny_cpu", *words]) == 143
    assert capsys.readouterr().err == "rlad: interrupted; start it again\n" and not list(tmp_path.iterdir())


def test_a_run_that_stopped_says_after_which_step(tmp_path, monkeypatch, capsys):
    def run_local(verb, config):
        (config.run_dir / "checkpoints").mkdir()
        (config.run_dir / "checkpoints" / "latest").write_text("17")
        return 143

    monkeypatch.setattr("rlad_megatron.launch.local.run_local", run_local)
    words = ["objective.name=cross_entropy", "data.train_size=64", f"runs_dir={tmp_path}", "name=a b"]
    assert main(["sft", "kk_tiny_cpu", *words]) == 143
    config = f"'{tmp_path / 'a b' / 'config.yaml'}'"
    assert capsys.readouterr().err == f"rlad: stopped after step 17; continue with: rlad sft {config} resume=true\n"
