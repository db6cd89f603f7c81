"""Rollouts and weight sync against real vLLM servers."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
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
    PROMPT,
    SLEEPS,
    HfStudent,
    assert_matches,
    assert_same_rollouts,
    fleet_of,
    hf_log_probs,
    kill_after,
    prompts,
    running,
    serve,
)

from rlad_megatron.config import SamplingConfig
from rlad_megatron.errors import ConfigError, RolloutError, WeightSyncError
from rlad_megatron.servers.client import Completion, ServerClient, ServerDownError, open_session
from rlad_megatron.servers.process import VllmServer
from rlad_megatron.servers.pusher import CANARY
from rlad_megatron.servers.sampling import sampling_body
from rlad_megatron.servers.stream import Round

pytestmark = pytest.mark.engine


def count_seeds(monkeypatch, servers: list[VllmServer]) -> list[tuple[int, int]]:
    """(server, seed) of every member that is asked for from now on."""
    asked: list[tuple[int, int]] = []
    for server in servers:

        def counted(session, body, *, index=server.index, sample=server.client.sample):
            asked.extend((index, seed) for seed in body["seeds"])
            return sample(session, body)

        monkeypatch.setattr(server.client, "sample", counted)
    return asked


def generated_tokens(client: ServerClient) -> float:
    lines = httpx.get(f"{client.url}/metrics", headers=client._headers, timeout=60.0).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


def sample(client: ServerClient, body: dict) -> list[tuple[int, Completion]]:
    async def collect():
        async with open_session(client.timeout_s) as session:
            return [pair async for pair in client.sample(session, body)]

    return asyncio.run(collect())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two servers of an untied model."""
    with serve(tmp_path_factory.mktemp("untied"), tied=False, servers=2) as result:
        yield result


def test_greedy_log_probs_are_those_of_transformers(served):
    assert_matches(served.first_decode, served.folder)


def test_sampled_log_probs_are_of_logits_over_temperature(served):
    served.push(served.folder)
    for members in served.fleet.generate(prompts(2), 2, SamplingConfig(temperature=0.6, max_tokens=32), batch=0):
        for rollout in members:
            expected = hf_log_probs(served.folder, list(rollout.prompt.tokens), rollout.tokens, temperature=0.6)
            torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, atol=1e-4, rtol=0)


def test_group_members_differ_and_end_at_eos(served):
    version = served.push(served.folder)
    sampling = SamplingConfig(max_tokens=160)
    first = served.fleet.generate(prompts(4), 4, sampling, batch=3)
    for members in first:
        assert len({tuple(rollout.tokens) for rollout in members}) == 4
        for rollout in members:
            assert len(rollout.tokens) == len(rollout.log_probs)
            assert rollout.versions == [(version, len(rollout.tokens))]
            assert EOS not in rollout.tokens[:-1]
            assert (rollout.finish_reason == "stop") == (rollout.tokens[-1] == EOS)
            assert rollout.finish_reason == "stop" or len(rollout.tokens) == 160
    assert {rollout.finish_reason for members in first for rollout in members} == {"stop", "length"}

    again = served.fleet.generate(prompts(4), 4, sampling, batch=3)
    other = served.fleet.generate(prompts(4), 4, sampling, batch=4)
    tokens = [[rollout.tokens for members in groups for rollout in members] for groups in (first, again, other)]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]
    assert [server.restarts for server in served.fleet.servers] == [0, 0]


def test_the_route_samples_what_vllms_own_route_does(served):
    version = served.push(served.folder)
    client, sampling = served.fleet.clients[0], SamplingConfig(temperature=0.8, top_p=0.9, max_tokens=48)
    seeds = [3, 2**62, 4, 5]
    ours = dict(sample(client, sampling_body(PROMPT, sampling, seeds, [EOS])))
    for member, seed in enumerate(seeds):
        ((_, alone),) = sample(client, sampling_body(PROMPT, sampling, [seed], [EOS]))
        body = {"prompt": PROMPT, "seed": seed, "temperature": 0.8, "top_p": 0.9, "max_tokens": 48, "logprobs": 0}
        body |= {"stop_token_ids": [EOS], "ignore_eos": True}
        body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        (choice,) = httpx.post(
            f"{client.url}/v1/completions", json=body, headers=client._headers, timeout=300.0
        ).json()["choices"]
        assert alone.tokens == choice["token_ids"] == ours[member].tokens
        assert alone.log_probs == choice["logprobs"]["token_logprobs"]
        torch.testing.assert_close(torch.tensor(ours[member].log_probs), torch.tensor(alone.log_probs))
        assert alone.finish_reason == choice["finish_reason"] == ours[member].finish_reason
        assert alone.versions == ours[member].versions == [(str(version), len(alone.tokens))]


def test_members_come_as_they_end(served):
    body = sampling_body(PROMPT, SamplingConfig(max_tokens=160), range(100, 104), [EOS])
    answers = sample(served.fleet.clients[0], body)
    lengths = [len(completion.tokens) for _, completion in answers]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    assert sorted(member for member, _ in answers) == [0, 1, 2, 3] != [member for member, _ in answers]


def test_a_refused_request_names_server_and_route(served):
    with pytest.raises(RolloutError, match=r"server \d .* answered 400 on /rlad/sample: .*max_tokens=300 .*=256"):
        served.fleet.generate(prompts(1), 1, SamplingConfig(max_tokens=300), batch=0)
    body = sampling_body(PROMPT, SamplingConfig(max_tokens=4), [1], [EOS])
    for change, said in (
        ({"prompt": []}, "prompt"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0.5]}, "seeds"),
        ({"params": {"top_k": -5}}, "top_k"),
        ({"params": {"hotness": 2}}, "hotness"),
    ):
        with pytest.raises(RolloutError, match=rf"server 0 .* answered 400 on /rlad/sample: .*{said}"):
            sample(served.fleet.clients[0], body | change)
    with pytest.raises(
        RolloutError, match=r"server 0 .* answered 404 on /none: .*start it with VLLM_SERVER_DEV_MODE=1"
    ):
        served.fleet.clients[0]._call("POST", "/none")
    stranger = ServerClient(0, served.fleet.clients[0].url, 60.0)
    with pytest.raises(RolloutError, match="answered 401 on /rlad/sample: .*; give the file with its secret as"):
        sample(stranger, body)
    with pytest.raises(RolloutError, match="answered 401 on /health"):
        stranger.healthy()


def push_from_rank(rank: int, world_size: int, folder: Path, servers: dict, run_dir: Path, version: int) -> str:
    """Push, then push again to a server that is gone; returns that error and prints the first's seconds."""
    run_dir.mkdir(exist_ok=True)
    with fleet_of(folder, run_dir, HfStudent(folder, rank, world_size, dist.group.WORLD), **servers) as fleet:
        begin = time.perf_counter()
        fleet.push(version)
        if rank == 0:
            print(f"sync of {len(servers['urls'])} servers: {time.perf_counter() - begin:.3f} s")
        assert fleet._pusher.transfer.path.exists()
        fleet.servers[0].client = ServerClient(0, f"http://127.0.0.1:{free_port()}", 1.0)
        with pytest.raises(ServerDownError) as caught:
            fleet._pusher.send(fleet.servers[:1], version)
    dist.barrier()
    assert not fleet._pusher.transfer.path.exists(), "leaving the fleet must remove the file"
    return str(caught.value)


def test_weights_pushed_from_two_ranks_are_decoded_with(served, tmp_path):
    served.push(served.folder)
    old = served.decode()
    version = served.new_version()
    told = run_ranks(push_from_rank, 2, served.other, running(served.fleet), tmp_path, version)
    assert told[0] == told[1] and "server 0" in told[0] and "/pause" in told[0]

    for index, decoded in enumerate(served.decode()):
        assert_matches(decoded, served.other)
        assert decoded.log_probs != old[index].log_probs
        assert served.fleet.clients[index].weight_version() == str(version)


def test_verify_compares_with_what_the_trainer_says(served):
    served.push(served.folder)
    metrics = served.fleet.verify()
    assert 0 <= metrics["sync/probe_abs_mean"] <= metrics["sync/probe_abs_max"] < 1e-4
    served.student.load(served.other)
    with pytest.raises(WeightSyncError, match=r"agreement: server 0 \(http.*over the probe.*the bound of float32"):
        served.fleet.verify()


def test_worker_refuses_another_version(served):
    transfer, client = served.fleet._pusher.transfer, served.fleet.clients[0]
    transfer.write(41)
    client.start_weight_update()
    with pytest.raises(RolloutError, match="/update_weights: .*not version 42"):
        client.update_weights({"path": str(transfer.path), "version": 42})
    version = served.push(served.folder)  # a new update makes good for a refused one
    assert client.weight_version() == str(version)
    assert_matches(served.decode()[0], served.folder)


def test_sleeping_servers_wake_with_new_weights(served, monkeypatch):
    """CPU servers keep their memory; their scheduler and routes sleep and wake as on GPUs."""
    fleet = served.fleet

    def asks(route: str) -> list[bool]:
        return [
            httpx.get(f"{client.url}/{route}", headers=client._headers, timeout=300.0).json()[route]
            for client in fleet.clients
        ]

    served.push(served.folder)
    with monkeypatch.context() as patch:
        patch.setattr(fleet, "_choice", SLEEPS)
        patch.setattr(fleet._pusher, "_sleep_level", SLEEPS.sleep_level)
        fleet.sleep()
        assert asks("is_sleeping") == [True, True]
        version = served.push(served.other)
        assert asks("is_sleeping") == asks("is_paused") == [False, False]
        for decoded in served.decode():
            assert_matches(decoded, served.other)
        client = fleet.clients[0]
        client.sleep(1)
        client.wake_up("weights")
        assert asks("is_sleeping") == [True, False], "without its cache a server must not take requests"
        client.wake_up("kv_cache")
        assert asks("is_sleeping") == [False, False]
        fleet.push(version)  # awake already, as after an evaluation or a restart
        assert asks("is_paused") == [False, False]
    fleet.sleep()  # no-op: these servers have GPUs to themselves
    assert asks("is_sleeping") == [False, False]


def test_servers_with_other_weights_are_not_used(served, monkeypatch):
    version = served.push(served.folder)
    monkeypatch.setattr(served.fleet, "version", version + 100)
    with pytest.raises(RolloutError, match=f"holds weights '{version}', not {version + 100}"):
        served.fleet.generate(prompts(1), 1, SamplingConfig(), batch=0)


def test_a_server_killed_mid_round_costs_only_what_it_had_not_answered(served, monkeypatch):
    fleet, sampling = served.fleet, SamplingConfig(max_tokens=64)
    version = served.push(served.other)  # not what a restarted server loads by itself
    undisturbed = fleet.generate(prompts(16), 4, sampling, batch=5)
    before = [server.restarts for server in fleet.servers]

    kill_after(monkeypatch, fleet.servers[1], answers=6)
    asked, pushed = count_seeds(monkeypatch, fleet.servers), []
    send = fleet._pusher.send

    def noted(servers, version):
        pushed.append(([server.index for server in servers], version))
        return send(servers, version)

    monkeypatch.setattr(fleet._pusher, "send", noted)
    disturbed = fleet.generate(prompts(16), 4, sampling, batch=5)
    assert 64 < len(asked) <= 64 + 4, "the kill must fall into the round, and only what was owed is asked for again"
    assert not pushed
    assert_same_rollouts(undisturbed, disturbed)

    fleet.push(version)
    assert pushed == [([1], CANARY), ([0, 1], version)], "a new process has to pass the canary"
    assert [server.restarts for server in fleet.servers] == [before[0], before[1] + 1]
    asked.clear()
    assert_same_rollouts(undisturbed, fleet.generate(prompts(16), 4, sampling, batch=5))
    assert {server for server, _ in asked} == {0, 1}


def test_responses_in_flight_go_on_with_the_weights_of_a_push(served):
    """Their keys and values are computed again, so each token has the log-prob that its weights give it."""
    fleet = served.fleet
    old = served.push(served.folder)
    batch = Round(9, prompts(64), 2, SamplingConfig(max_tokens=240), needed=64)  # more than run at once
    before = [generated_tokens(client) for client in fleet.clients]
    fleet.submit(batch)
    for client, count in zip(fleet.clients, before, strict=True):
        while generated_tokens(client) < count + 8:
            time.sleep(0.01)
    new = served.push(served.other)
    rollouts = [rollout for group in fleet.collect(batch) for rollout in group.rollouts]
    mixed = [rollout for rollout in rollouts if len(rollout.versions) == 2]
    assert mixed, "the push must fall into the round"
    for rollout in rollouts:
        start = 0
        for version, count in rollout.versions:
            folder = {old: served.folder, new: served.other}[version]
            expected = hf_log_probs(folder, list(rollout.prompt.tokens), rollout.tokens)[start : start + count]
            found = torch.tensor(rollout.log_probs[start : start + count])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            start += count


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"rollout\.port={port}.*choose another"),
            fleet_of("unused", tmp_path, port=port),
        ):
            pass


def test_a_failed_start_is_reported_at_once(tmp_path):
    fleet = fleet_of(tmp_path / "no-such-model", tmp_path)
    begin = time.monotonic()
    with pytest.raises(RolloutError, match=r"server 0 .*exit code 1.*vllm_0\.log.*no-such-model"), fleet:
        pass
    assert time.monotonic() - begin < fleet.config.startup_timeout_s / 2
    assert not any(server.alive() for server in fleet.servers)


PARENT = """
import os, sys, time
from pathlib import Path
from rlad_megatron.servers.process import Launch, VllmServer
from rlad_megatron.config import RolloutConfig
# As vLLM: a process with a child, both deaf to SIGTERM.
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{deaf}']); {deaf}"
launch = Launch([sys.executable, "-c", child], dict(os.environ), Path(sys.argv[1]) / "log")
server = VllmServer(RolloutConfig(), 0, "http://127.0.0.1:1", launch)
server.start()
print(server._supervisor.pid, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_when_the_trainer_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ)
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
