"""Rollouts and weight sync against real vLLM servers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from ports import free_port
from tiny_servers import (
    EOS,
    MAX_MODEL_LEN,
    PROMPT,
    half_source,
    hf_log_probs,
    kill_api_server,
    rollout_config,
)

from rlad_megatron.config import SamplingConfig
from rlad_megatron.errors import ConfigError, RolloutError, WeightSyncError
from rlad_megatron.servers.client import ServerClient
from rlad_megatron.servers.fleet import ServerFleet, generate_groups
from rlad_megatron.servers.process import VllmServer
from rlad_megatron.servers.transfer.choice import Transfer
from rlad_megatron.servers.transfer.proof import decode_probe, verify_probe
from rlad_megatron.servers.transfer.sync import WeightSync
from rlad_megatron.types import Prompt

pytestmark = pytest.mark.engine


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=str(i), tokens=(*PROMPT, i % 190), answer="", subset="", text="") for i in range(count)]


def no_push(servers: list[int]) -> None:
    raise AssertionError(f"no server should have been restarted, but {servers} were")


def kill_after(monkeypatch, engine: ServerFleet, server: VllmServer, *, answers: int) -> None:
    """Kill `server` as soon as it has answered so many requests: in the middle of a batch on any machine."""
    complete, answered = engine._complete, []

    async def counted(client, index, body):
        choice = await complete(client, index, body)
        if index == server.index:
            answered.append(index)
            if len(answered) == answers:
                kill_api_server(server)
        return choice

    monkeypatch.setattr(engine, "_complete", counted)


def assert_matches(decoded: list[tuple[int, float]], folder: Path) -> None:
    tokens, log_probs = zip(*decoded, strict=True)
    expected = hf_log_probs(folder, PROMPT, list(tokens))
    torch.testing.assert_close(torch.tensor(log_probs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fixture", ["served", "served_tied"])
def test_greedy_log_probs_are_those_of_transformers(fixture, request):
    served = request.getfixturevalue(fixture)
    assert_matches(served.first_decode, served.folder)


def test_sampled_log_probs_are_of_logits_over_temperature(served):
    version = served.push(served.folder)
    sampling = SamplingConfig(temperature=0.6, max_tokens=32)
    result = served.engine.generate(prompts(2), 2, sampling, seed=0, weight_version=version)
    for rollout in (rollout for members in result.rollouts for rollout in members):
        expected = hf_log_probs(served.folder, list(rollout.prompt.tokens), rollout.tokens, temperature=0.6)
        torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, atol=1e-4, rtol=0)


def test_group_members_differ_and_end_at_eos(served):
    version = served.push(served.folder)
    sampling = SamplingConfig(max_tokens=160)
    first = generate_groups(
        served.engine, prompts(4), 4, sampling, seed=3, weight_version=version, push_weights=no_push
    )
    for members in first:
        assert len({tuple(rollout.tokens) for rollout in members}) == 4
        for rollout in members:
            assert len(rollout.tokens) == len(rollout.log_probs)
            assert rollout.weight_version == version
            assert EOS not in rollout.tokens[:-1]
            assert (rollout.finish_reason == "stop") == (rollout.tokens[-1] == EOS)
            assert rollout.finish_reason == "stop" or len(rollout.tokens) == 160
    assert {rollout.finish_reason for members in first for rollout in members} == {"stop", "length"}

    again = generate_groups(
        served.engine, prompts(4), 4, sampling, seed=3, weight_version=version, push_weights=no_push
    )
    other = generate_groups(
        served.engine, prompts(4), 4, sampling, seed=4, weight_version=version, push_weights=no_push
    )
    tokens = [[rollout.tokens for members in groups for rollout in members] for groups in (first, again, other)]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]


def push_from_rank(rank: int, world_size: int, folder: Path, urls: list[str], run_dir: Path, version: int) -> str:
    """Push, then push again to a server that is not there; returns that error and prints the first's seconds."""
    source = half_source(folder, rank, world_size, dist.group.WORLD)
    with WeightSync(source, urls, run_dir=run_dir, timeout_s=300.0) as sync:
        begin = time.perf_counter()
        sync.push(version)
        if rank == 0:
            print(f"sync of {len(urls)} servers: {time.perf_counter() - begin:.3f} s")
        sync._clients = [ServerClient(0, f"http://127.0.0.1:{free_port()}", 1.0)]
        with pytest.raises(WeightSyncError) as caught:
            sync.push(version)
    dist.barrier()
    assert not sync._engine.path.exists(), "the file must be gone after close"
    return str(caught.value)


@pytest.mark.parametrize("fixture", ["served", "served_tied"])
def test_weights_pushed_from_two_ranks_are_decoded_with(fixture, request):
    served = request.getfixturevalue(fixture)
    served.push(served.folder)
    old = decode_probe(served.engine, PROMPT, 24)
    version = served.next_version
    served.next_version += 1
    arguments = (served.other, served.engine.urls, served.engine.run_dir, version)
    told = run_ranks(push_from_rank, 2, *arguments)
    assert told[0] == told[1] and "server 0" in told[0] and "/pause" in told[0]

    new = decode_probe(served.engine, PROMPT, 24)
    for index, decoded in enumerate(new):
        assert_matches(decoded, served.other)
        assert decoded != old[index]
        assert ServerClient(index, served.engine.urls[index], 300.0).weight_version() == str(version)
        log_probs = [log_prob for _, log_prob in decoded]
        expected = hf_log_probs(served.other, PROMPT, [token for token, _ in decoded]).tolist()
        assert verify_probe(log_probs, expected, 1e-3, index) < 1e-4
        stale = hf_log_probs(served.folder, PROMPT, [token for token, _ in decoded]).tolist()
        with pytest.raises(WeightSyncError, match=rf"server {index} .*nats.*rollout\.probe_bound"):
            verify_probe(log_probs, stale, 1e-3, index)


def test_worker_refuses_another_version(served):
    with served.sync(served.folder) as sync:
        sync._engine.write(41)
        client = sync._clients[0]
        client.start_weight_update()
        with pytest.raises(WeightSyncError, match="not version 42"):
            client.update_weights({"path": str(sync._engine.path), "version": 42})
    version = served.push(served.folder)  # a refused update can be made good by a new one
    assert client.weight_version() == str(version)
    assert_matches(served.engine.decode(0, PROMPT, 24), served.folder)


def test_sleeping_servers_wake_with_new_weights(served):
    """CPU servers keep their memory; their scheduler and routes sleep and wake as on GPUs."""

    def asks(route: str) -> list[bool]:
        return [httpx.get(f"{url}/{route}", timeout=300.0).json()[route] for url in served.engine.urls]

    served.push(served.folder)
    version = served.next_version
    served.next_version += 1
    with served.sync(served.other, Transfer("shared_memory", sleep_level=2)) as sync:
        assert sync.sleep([0, 1]) == {}
        assert asks("is_sleeping") == [True, True]
        sync.push(version)
        assert asks("is_sleeping") == asks("is_paused") == [False, False]
        for decoded in decode_probe(served.engine, PROMPT, 24):
            assert_matches(decoded, served.other)
        client = sync._clients[0]
        client.sleep(1)
        client.wake_up("weights")
        assert asks("is_sleeping") == [True, False], "without its cache a server must not take requests"
        client.wake_up("kv_cache")
        assert asks("is_sleeping") == [False, False]
        sync.push(version)  # awake already, as after an evaluation or a restart
        assert asks("is_paused") == [False, False]
    with served.sync(served.folder) as sync:
        sync.sleep([0, 1])  # these servers are none that sleep
        assert asks("is_sleeping") == [False, False]


def test_servers_with_other_weights_are_not_used(served):
    version = served.push(served.folder)
    with pytest.raises(RolloutError, match=f"holds weights '{version}', not {version + 100}"):
        served.engine.generate(prompts(1), 1, SamplingConfig(), seed=0, weight_version=version + 100)


def test_a_server_killed_mid_batch_changes_nothing(served, monkeypatch):
    engine, sampling = served.engine, SamplingConfig(max_tokens=64)
    version = served.push(served.other)  # not what a restarted server loads by itself
    undisturbed = generate_groups(
        engine, prompts(16), 4, sampling, seed=5, weight_version=version, push_weights=no_push
    )

    results, pushed = [], []
    generate = engine.generate

    def watched(*args, **kwargs):
        results.append(generate(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(engine, "generate", watched)
    kill_after(monkeypatch, engine, engine.servers[1], answers=6)
    restarts = list(engine.restarts)
    with served.sync(served.other) as sync:

        def push(servers: list[int]) -> None:
            pushed.append(servers)
            sync.push(version, servers)

        disturbed = generate_groups(engine, prompts(16), 4, sampling, seed=5, weight_version=version, push_weights=push)

    assert pushed == [[1]] and len(results) == 2
    assert 0 < results[0].rollouts.count(None) < 16, "the kill must fall into the batch"
    assert engine.restarts == [restarts[0], restarts[1] + 1]
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert [rollout.tokens for rollout in before] == [rollout.tokens for rollout in after]
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-4, rtol=0)


def test_too_many_deaths_end_the_run(served_tied, monkeypatch):
    engine = served_tied.engine
    version = served_tied.push(served_tied.folder)
    monkeypatch.setattr(engine, "config", replace(engine.config, max_restarts=0))
    kill_after(monkeypatch, engine, engine.servers[0], answers=6)
    with pytest.raises(RolloutError, match=r"server 0 .*rollout\.max_restarts=0.*vllm_0\.log"):
        engine.generate(prompts(64), 4, SamplingConfig(max_tokens=128), seed=0, weight_version=version)


def test_a_server_that_does_not_go_to_sleep_is_stopped_and_restarted_before_the_push(served_tied, monkeypatch, capsys):
    """The one that the test above has killed."""
    engine = served_tied.engine
    with served_tied.sync(served_tied.folder, Transfer("shared_memory", sleep_level=2)) as sync:
        ((index, error),) = sync.sleep([0]).items()
    assert index == 0 and "server 0" in str(error) and "/sleep" in str(error)
    with monkeypatch.context() as patch, pytest.raises(WeightSyncError, match="/sleep"):
        patch.setattr(engine, "config", replace(engine.config, urls=("http://elsewhere:1",)))
        engine.stop_failed(0, error)
    engine.stop_failed(0, error)
    assert engine.alive() == [] and f"is stopped: {error}" in capsys.readouterr().err
    monkeypatch.setattr(engine, "config", replace(engine.config, max_restarts=0))
    with pytest.raises(RolloutError, match=r"server 0 .*died again.*rollout\.max_restarts=0"):
        engine.restart_dead()  # it would start it, were restarts left


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        engine = ServerFleet(rollout_config(port=port), tmp_path)
        with pytest.raises(ConfigError, match=rf"rollout\.port={port}.*choose another"):
            engine.start("unused", MAX_MODEL_LEN, [EOS])


def test_a_failed_start_is_reported_at_once(tmp_path):
    engine = ServerFleet(rollout_config(), tmp_path)
    begin = time.monotonic()
    with pytest.raises(RolloutError, match=r"server 0 .*exit code 1.*vllm_0\.log.*no-such-model"):
        engine.start(str(tmp_path / "no-such-model"), MAX_MODEL_LEN, [EOS])
    assert time.monotonic() - begin < engine.config.startup_timeout_s / 2
    assert not any(server.alive() for server in engine.servers)


PARENT = """
import sys, time
from rlad_megatron.servers.process import VllmServer
from rlad_megatron.servers.transfer.choice import Transfer
from rlad_megatron.config import RolloutConfig
server = VllmServer(RolloutConfig(port=int(sys.argv[1])), 0, model_path="x", max_model_len=8, run_dir=sys.argv[2])
# As vLLM: a process with a child of its own, both deaf to SIGTERM.
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{deaf}']); {deaf}"
server._command = [sys.executable, "-c", child]
server.start()
print(server._supervisor.pid, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_when_the_trainer_is_killed(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(free_port()), str(tmp_path)], stdout=subprocess.PIPE, env=os.environ
    )
    supervisor = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 120
    while len(supervisor.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    processes = [supervisor, *supervisor.children(recursive=True)]
    assert len(processes) == 3
    parent.kill()
    parent.wait()
    _, left = psutil.wait_procs(processes, timeout=120)
    assert not left
