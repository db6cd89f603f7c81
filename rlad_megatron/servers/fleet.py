"""Groups of responses from vLLM servers.

`ServerFleet` lives on rank 0 and talks to the servers. `generate_groups` is what all ranks call: it keeps
them together when a server has to be restarted and its weights pushed again.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rlad_megatron.config import RolloutConfig, SamplingConfig
from rlad_megatron.errors import RolloutError
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.servers.process import ExternalServer, VllmServer, check_ports
from rlad_megatron.servers.transfer.choice import ON_CPUS, Transfer
from rlad_megatron.types import Prompt, Rollout

UNPUSHED = "default"  # what vLLM calls the weights that it loaded itself, from model_path
Groups = list[list[Rollout] | None]  # by prompt; None: not finished


@dataclass
class GenerateResult:
    """What one call of `ServerFleet.generate` brought.

    Example: GenerateResult(rollouts=[[r00, r01], None], restarted=[1]): server 1 died while it worked on prompt 1.
    """

    rollouts: Groups  # [prompts][group_size]
    restarted: list[int]  # servers that hold the weights of model_path now and need the current ones


class _ServerDownError(Exception):
    """A request failed in a way that says that the server is gone. Never leaves this module."""


def request_seed(seed: int, prompt_index: int, member: int) -> int:
    """Seed of one request: the first 8 bytes of blake2b("seed/prompt_index/member"), without the sign bit.

    It depends on the place of a response in the batch alone, so neither timing nor the choice of server
    changes what is sampled. (Equal weights and equal seeds still leave floating-point differences between
    batches of different composition; they move a token once in very many.)
    """
    digest = hashlib.blake2b(f"{seed}/{prompt_index}/{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ServerFleet:
    """The run's servers, as seen from rank 0. A context manager: leaving it stops the servers."""

    def __init__(
        self,
        config: RolloutConfig,
        run_dir: Path,
        *,
        seed: int = 0,
        devices: Sequence[str] | None = None,
        transfer: Transfer = ON_CPUS,
    ) -> None:
        """devices: CUDA_VISIBLE_DEVICES of each own server; None: all inherit this process's.

        transfer: what own servers are started for; the default suffices where no weights are pushed.
        """
        self.config = config
        self.run_dir = Path(run_dir)
        self.servers: list[VllmServer | ExternalServer] = []
        self.restarts: list[int] = []  # by server, in this run
        self._seed = seed
        self._devices = devices
        self._transfer = transfer
        self._eos_ids: list[int] = []

    def __enter__(self) -> ServerFleet:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    def start(self, model_path: str, max_model_len: int, eos_ids: Sequence[int]) -> None:
        """Start all servers at once and wait for them.

        model_path: the Hugging Face folder that they load first. max_model_len: prompt and response together.
        eos_ids: the tokens that end a response; nothing else does.
        Raises ConfigError (port taken) or RolloutError (a server did not come up; none is left running).
        """
        check_ports(self.config)
        self._eos_ids = list(eos_ids)
        if self.config.urls:
            self.servers = [ExternalServer(self.config, index) for index in range(len(self.config.urls))]
        else:
            self.servers = [
                VllmServer(
                    self.config,
                    index,
                    model_path=model_path,
                    max_model_len=max_model_len,
                    run_dir=self.run_dir,
                    seed=self._seed,
                    devices=self._devices[index] if self._devices else None,
                    transfer=self._transfer,
                )
                for index in range(self.config.servers)
            ]
        self.restarts = [0] * len(self.servers)
        try:
            for server in self.servers:
                server.start()
            for server in self.servers:
                server.wait_ready()
        except BaseException:  # Ctrl-C too must not leave servers behind
            self.stop()
            raise

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    def alive(self) -> list[int]:
        """Indices of the servers whose process is there."""
        return [server.index for server in self.servers if server.alive()]

    def restart_dead(self) -> list[int]:
        """Restart the servers whose process is gone; returns their indices. They need the current weights.

        Worth a call before weights are pushed: a server may have died while the trainer was busy.
        """
        dead = [server.index for server in self.servers if not server.alive()]
        for index in dead:
            self._restart(index, "its process is gone")
        for index in dead:
            self.servers[index].wait_ready()
        return dead

    def stop_failed(self, index: int, error: Exception) -> None:
        """Stop a server that failed at something, so that its memory is free; `restart_dead` starts it again.

        Raises `error` where the server is somebody else's.
        """
        if self.config.urls:
            raise error
        print(f"{self.servers[index].name} is stopped: {error}", file=sys.stderr)
        self.servers[index].stop()

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: SamplingConfig,
        *,
        seed: int,
        weight_version: int,
        indices: Sequence[int] | None = None,
    ) -> GenerateResult:
        """Sample `group_size` responses to each prompt.

        seed: of this batch; every batch of a run needs its own. weight_version: what the servers must hold;
        version 0 is model_path itself. indices: place of each prompt in the whole batch, for the seeds, when
        `prompts` is only a part of it; default 0, 1, 2, ...

        A prompt comes back as None if one of its requests was with a server that died. Such a server has been
        restarted when this returns. Raises RolloutError when a server died more than rollout.max_restarts
        times, holds other weights, or refuses a request.
        """
        indices = range(len(prompts)) if indices is None else indices
        jobs = [
            (place, member, self._request(prompt, sampling, request_seed(seed, index, member)))
            for place, (prompt, index) in enumerate(zip(prompts, indices, strict=True))
            for member in range(group_size)
        ]
        restarted = self._check_weights(weight_version)
        usable = [server.index for server in self.servers if server.index not in restarted]
        finished, died = asyncio.run(self._run(jobs, usable)) if usable else ({}, [])
        for index in restarted + died:
            self.servers[index].wait_ready()
        groups: Groups = []
        for place, prompt in enumerate(prompts):
            choices = [finished.get((place, member)) for member in range(group_size)]
            groups.append(
                None if None in choices else [_rollout(prompt, choice, weight_version) for choice in choices if choice]
            )
        return GenerateResult(groups, sorted(restarted + died))

    def decode(self, server: int, prompt_tokens: Sequence[int], num_tokens: int) -> list[tuple[int, float]]:
        """Decode greedily on one server: `num_tokens` of (token, log-prob in nats at temperature 1)."""
        body = {
            "prompt": list(prompt_tokens),
            "max_tokens": num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        target = self.servers[server]
        try:
            response = httpx.post(f"{target.url}/v1/completions", json=body, timeout=self.config.request_timeout_s)
        except httpx.TransportError as error:
            raise RolloutError(f"{target.name} did not decode: {error!r}; {target.log_tail()}") from error
        if response.status_code != 200:
            raise RolloutError(f"{target.name} refused to decode: {response.text}")
        choice = response.json()["choices"][0]
        return list(zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True))

    def _request(self, prompt: Prompt, sampling: SamplingConfig, seed: int) -> dict[str, Any]:
        return {
            "prompt": list(prompt.tokens),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            # Only our own list ends a response, whatever the checkpoint's configuration names.
            "ignore_eos": True,
            "stop_token_ids": self._eos_ids,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # the server has no tokenizer to make text with
        }

    def _check_weights(self, version: int) -> list[int]:
        """Every server must hold `version`. Servers that do not answer are restarted; returns their indices."""
        restarted = []
        for server in self.servers:
            try:
                response = httpx.get(f"{server.url}/weight_info", timeout=self.config.request_timeout_s)
            except httpx.TransportError as error:
                self._restart(server.index, repr(error))
                restarted.append(server.index)
                continue
            if response.status_code != 200:
                raise RolloutError(
                    f"{server.name} answers {response.status_code} on /weight_info; start it with "
                    f"VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config"
                )
            held = response.json()["weight_version"]
            if held == UNPUSHED and version > 0:  # somebody restarted it
                restarted.append(server.index)
                continue
            if held != str(version) and not (version == 0 and held == UNPUSHED):
                raise RolloutError(f"{server.name} holds weights {held!r}, not {version}; push the weights first")
        return restarted

    def _restart(self, index: int, why: str) -> None:
        """Begin a restart and count it; the caller waits for the server later."""
        server = self.servers[index]
        if self.restarts[index] >= self.config.max_restarts:
            raise RolloutError(
                f"{server.name} died again after {self.restarts[index]} restarts (rollout.max_restarts="
                f"{self.config.max_restarts}): {why}; {server.log_tail()}"
            )
        self.restarts[index] += 1
        print(f"{server.name} is restarted ({self.restarts[index]}): {why}", file=sys.stderr)
        server.restart()

    async def _run(
        self, jobs: list[tuple[int, int, dict[str, Any]]], usable: list[int]
    ) -> tuple[dict[tuple[int, int], dict[str, Any]], list[int]]:
        """Send all requests; returns the answers by (prompt place, member) and the servers that died.

        Each server has up to max_concurrency workers that take jobs from one queue, so that the faster server
        gets more. Workers start in turn over the servers, so that a small batch is spread evenly.
        """
        queue = deque(jobs)
        finished: dict[tuple[int, int], dict[str, Any]] = {}
        died: list[int] = []
        progress = Progress(
            TextColumn("rollout"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        task = progress.add_task("rollout", total=len(jobs))

        async def work(client: httpx.AsyncClient, index: int) -> None:
            while queue and index not in died:
                place, member, body = queue.popleft()
                try:
                    finished[place, member] = await self._complete(client, index, body)
                except _ServerDownError as error:
                    if index not in died:  # the first of its workers to notice
                        died.append(index)
                        await asyncio.to_thread(self._restart, index, str(error))
                    return
                progress.advance(task)

        workers_each = min(self.config.max_concurrency, -(-len(jobs) // len(usable)))
        timeout = httpx.Timeout(self.config.request_timeout_s, pool=None)
        # Idle connections are dropped before the server drops them (vLLM: after 5 s), so that a request never meets a
        # closed one, which would look like a dead server.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
        with progress:
            async with httpx.AsyncClient(timeout=timeout, limits=limits) as client:
                await asyncio.gather(*(work(client, index) for _ in range(workers_each) for index in usable))
        return finished, died

    async def _complete(self, client: httpx.AsyncClient, index: int, body: dict[str, Any]) -> dict[str, Any]:
        server = self.servers[index]
        try:
            response = await client.post(f"{server.url}/v1/completions", json=body)
        except httpx.ReadTimeout as error:
            raise RolloutError(
                f"{server.name} did not answer a request within rollout.request_timeout_s="
                f"{self.config.request_timeout_s:g}; raise it, or lower rollout.max_concurrency"
            ) from error
        except httpx.TransportError as error:  # refused or cut off
            raise _ServerDownError(repr(error)) from error
        if response.status_code >= 500:  # its engine process died
            raise _ServerDownError(f"HTTP {response.status_code}: {response.text}")
        if response.status_code != 200:
            raise RolloutError(f"{server.name} refused a request of {len(body['prompt'])} tokens: {response.text}")
        return response.json()["choices"][0]


def _rollout(prompt: Prompt, choice: dict[str, Any], weight_version: int) -> Rollout:
    tokens, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if len(tokens) != len(log_probs):
        raise RolloutError(f"prompt {prompt.id!r}: {len(tokens)} tokens came with {len(log_probs)} log-probs")
    return Rollout(prompt, tokens, log_probs, choice["finish_reason"], weight_version)


def generate_groups(
    fleet: ServerFleet | None,
    prompts: Sequence[Prompt],
    group_size: int,
    sampling: SamplingConfig,
    *,
    seed: int,
    weight_version: int,
    push_weights: Callable[[list[int]], None],
    group: dist.ProcessGroup | None = None,
) -> list[list[Rollout]]:
    """`group_size` responses to each prompt, on every rank. All ranks of `group` call this together.

    fleet: on rank 0 of the group, None elsewhere. push_weights(servers): called on all ranks together to
    give restarted servers the weights of `weight_version`. group: a gloo group, None for one process.
    Returns [prompts][group_size]. An error of rank 0 is raised on every rank.
    """
    groups: Groups = [None] * len(prompts)

    def next_round() -> tuple[list[int], Groups | None]:
        assert fleet is not None
        pending = [place for place, members in enumerate(groups) if members is None]
        result = fleet.generate(
            [prompts[place] for place in pending],
            group_size,
            sampling,
            seed=seed,
            weight_version=weight_version,
            indices=pending,
        )
        for place, members in zip(pending, result.rollouts, strict=True):
            groups[place] = members
        return result.restarted, None if None in groups else groups

    while True:  # each round but the last has used up a restart
        restarted, complete = on_first_rank(next_round, group)
        if restarted:
            push_weights(restarted)
        if complete is not None:
            return [members for members in complete if members is not None]
