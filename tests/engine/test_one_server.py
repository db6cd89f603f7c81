"""One running server of a tied model: weights, their proof, and what follows when the only server ends."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest
import torch
from tiny_servers import (
    SLEEPS,
    assert_matches,
    assert_same_rollouts,
    fleet_of,
    kill_after,
    kill_engine,
    prompts,
    running,
    serve,
)

from rlad_megatron.config import SamplingConfig
from rlad_megatron.errors import RolloutError, WeightSyncError
from rlad_megatron.servers.transfer.choice import TransferChoice

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Its engine, which is forked, has two threads, as on a machine with more cores."""
    with serve(tmp_path_factory.mktemp("tied"), tied=True, servers=1, threads=2) as result:
        yield result


def test_greedy_log_probs_are_those_of_transformers(served):
    assert_matches(served.first_decode, served.folder)


def test_the_engine_is_a_fork_of_the_api_server(served):
    """Spawned, it would import vLLM again."""
    (server,) = served.fleet.servers
    (api_server,) = psutil.Process(server._supervisor.pid).children()
    (engine,) = api_server.children()  # a spawned one comes with multiprocessing's resource tracker
    assert "EngineCore" in engine.cmdline()[0] and server.launch.environment["OMP_NUM_THREADS"] == "2"


def test_a_server_of_another_backend_is_told_the_flag(served):
    servers = running(served.fleet)
    with (
        fleet_of(
            served.folder,
            served.folder,
            served.student,
            transfer=TransferChoice("collective", sleep_level=0),
            **servers,
        ) as fleet,
        pytest.raises(RolloutError, match=r"server \d .*--weight-transfer-config '{\"backend\": \"collective\"}'"),
    ):
        fleet.push(1)


@pytest.mark.parametrize("victim", ["model.layers.1.self_attn.k_norm.weight", "model.embed_tokens.weight"])
def test_one_flipped_bit_is_found_with_the_tensors_name(served, monkeypatch, victim):
    served.push(served.folder)
    transfer = served.fleet._pusher.transfer
    write = transfer.write

    def write_and_flip(version):
        write(version)
        transfer._tensors[victim].view(-1)[3:4].view(torch.int32).bitwise_xor_(1)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "write", write_and_flip)
        with pytest.raises(WeightSyncError, match=f"fingerprints: server 0 .* sent in {victim} "):
            served.push(served.folder)
    served.push(served.folder)


def test_a_server_goes_through_the_canary_once_for_each_start(served, monkeypatch):
    fleet, sent = served.fleet, []
    served.push(served.folder)
    send = fleet._pusher.send
    monkeypatch.setattr(fleet._pusher, "send", lambda servers, version: sent.append(version) or send(servers, version))
    version = served.push(served.other)
    assert sent == [version]
    monkeypatch.setattr(fleet, "_proven", set())
    fleet.push(version)
    assert sent == [version, -2, version]
    assert fleet.verify()["sync/probe_abs_max"] < 1e-4
    assert_matches(served.decode()[0], served.other)


def test_a_round_goes_on_when_its_only_server_is_back(served, monkeypatch):
    fleet, sampling = served.fleet, SamplingConfig(max_tokens=64)
    served.push(served.other)
    undisturbed = fleet.generate(prompts(8), 4, sampling, batch=5)
    kill_after(monkeypatch, fleet.servers[0], answers=6, kill=kill_engine)
    assert_same_rollouts(undisturbed, fleet.generate(prompts(8), 4, sampling, batch=5))
    assert fleet.servers[0].restarts == 1


def test_too_many_deaths_end_the_run(served, monkeypatch):
    (server,) = served.fleet.servers
    served.push(served.folder)
    monkeypatch.setattr(server, "config", replace(server.config, max_restarts=0))
    kill_after(monkeypatch, server, answers=6, kill=kill_engine)
    with pytest.raises(RolloutError, match=r"server 0 .*rollout\.max_restarts=0.*/rlad/sample.*vllm_0\.log"):
        served.fleet.generate(prompts(64), 4, SamplingConfig(max_tokens=128), batch=0)


def test_a_server_that_does_not_go_to_sleep_is_stopped_and_restarted_before_the_push(served, monkeypatch, capsys):
    fleet, (server,) = served.fleet, served.fleet.servers
    server.stop()
    monkeypatch.setattr(fleet, "_choice", SLEEPS)
    with monkeypatch.context() as patch:
        patch.setattr(server, "alive", lambda: True)
        with monkeypatch.context() as inner:
            inner.setattr(server, "launch", None)  # an external one is not ours to stop
            with pytest.raises(RolloutError, match="server 0 .*/sleep"):
                fleet.sleep()
        fleet.sleep()
    said = capsys.readouterr().err
    assert not server.alive() and "server 0" in said and "is stopped: " in said and "/sleep" in said
    fleet.sleep()  # a server that is gone is left alone
    monkeypatch.setattr(server, "config", replace(server.config, max_restarts=0))
    with pytest.raises(RolloutError, match=r"server 0 .*died again.*rollout\.max_restarts=0"):
        fleet.push(9)  # it would start it, were restarts left
