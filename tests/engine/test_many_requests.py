"""Servers on CPUs with as many requests in flight as the configuration's default, and with long prompts."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
import torch
from tiny_servers import VOCAB, fleet_of, hf_log_probs, write_checkpoint

from rlad_megatron.config import DataConfig, RolloutConfig, SamplingConfig
from rlad_megatron.data.prompts import build_prompts
from rlad_megatron.data.tokenizers import load_tokenizer
from rlad_megatron.servers.client import open_session
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.process import CPU_BLOCK_TOKENS, CPU_STEP_TOKENS
from rlad_megatron.servers.sampling import sampling_body
from rlad_megatron.types import Prompt, Rollout

pytestmark = pytest.mark.engine

KK_TOKENIZER = Path(__file__).parents[2] / "recipes" / "assets" / "kk_tokenizer"
IN_FLIGHT = RolloutConfig().max_concurrency
POSITIONS = 4096
BLOCKS = 300  # of the KV cache; a short request takes 1, and one of POSITIONS 32
BLOCK_BYTES = CPU_BLOCK_TOKENS * 2 * 2 * 2 * 32 * 4  # 2 layers, keys and values, 2 heads of 32, float32


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    base = tmp_path_factory.mktemp("many")
    folder = write_checkpoint(base / "model", seed=1, tied=True, positions=POSITIONS)
    cache = BLOCKS * BLOCK_BYTES / 2**30
    with fleet_of(
        folder, base / "run", max_model_len=POSITIONS, max_concurrency=IN_FLIGHT, kv_cache_gb=cache, max_restarts=0
    ) as fleet:
        fleet.folder = folder
        yield fleet


@pytest.fixture(scope="module")
def puzzles() -> list[Prompt]:
    """IN_FLIGHT puzzles of four people: more tokens than vLLM's default budget for a step."""
    data = DataConfig(people=(4,), prompt_style="plain", train_size=IN_FLIGHT, eval_size=1)
    prompts = build_prompts(data, load_tokenizer(KK_TOKENIZER), "train")
    assert sum(len(prompt.tokens) for prompt in prompts) > 4 * CPU_STEP_TOKENS
    return prompts


@pytest.fixture
def answers(fleet, monkeypatch):
    """A function that samples one response to each prompt with so many requests in flight."""

    def sample(prompts: list[Prompt], *, in_flight: int = IN_FLIGHT, **sampling) -> list[Rollout]:
        monkeypatch.setattr(fleet._stream, "_max_concurrency", in_flight)
        fleet._stream.dismiss(fleet.servers[0])
        fleet._stream.admit(fleet.servers)
        return [rollout for (rollout,) in fleet.generate(prompts, 1, SamplingConfig(**sampling), batch=0)]

    return sample


def assert_same(many: list[Rollout], few: list[Rollout]) -> None:
    for one, other in zip(many, few, strict=True):
        assert one.tokens == other.tokens
        torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-4, rtol=0)


def metric(fleet: ServerFleet, name: str) -> float:
    (line,) = [
        line
        for line in httpx.get(f"{fleet.clients[0].url}/metrics", headers=fleet.clients[0]._headers).text.splitlines()
        if line.startswith(f"vllm:{name}{{")
    ]
    return float(line.split()[-1])


def wait_until(fact, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_many_puzzles_are_answered_as_few(answers, puzzles):
    seeded = answers(puzzles, max_tokens=16)
    assert len({tuple(rollout.tokens) for rollout in seeded}) > IN_FLIGHT / 2
    greedy = {"temperature": 0.0, "max_tokens": 16}
    assert_same(answers(puzzles, **greedy), answers(puzzles, **greedy, in_flight=4))


def random_prompt(length: int, seed: int) -> Prompt:
    tokens = torch.randint(10, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Prompt(id=str(seed), tokens=tuple(tokens), answer="", subset="", text="")


def test_a_prompt_longer_than_the_default_budget_is_served_next_to_others(fleet, answers, puzzles):
    long = random_prompt(CPU_STEP_TOKENS * 3 // 2, seed=0)
    mixed = [*puzzles[:40], long, *puzzles[40:80]]
    answers(mixed, max_tokens=16)
    greedy = {"temperature": 0.0, "max_tokens": 16}
    many = answers(mixed, **greedy)
    assert_same(many, answers(mixed, **greedy, in_flight=4))
    expected = hf_log_probs(fleet.folder, list(long.tokens), many[40].tokens)
    torch.testing.assert_close(torch.tensor(many[40].log_probs), expected, atol=1e-4, rtol=0)


def test_requests_that_the_cache_cannot_hold_continue_where_they_were(fleet, answers):
    """vLLM preempts them, and computes prompt and response so far again."""
    blocks_each = -(-(1000 + 256) // CPU_BLOCK_TOKENS)
    prompts = [random_prompt(1000, seed) for seed in range(3 * BLOCKS // blocks_each)]
    before = metric(fleet, "num_preemptions_total")
    many = answers(prompts, max_tokens=256)
    after = metric(fleet, "num_preemptions_total")
    assert after > before
    assert_same(many, answers(prompts, max_tokens=256, in_flight=BLOCKS // blocks_each - 1))
    assert metric(fleet, "num_preemptions_total") == after


def test_a_client_that_leaves_aborts_its_members(fleet):
    client = fleet.clients[0]
    body = sampling_body([3, 14, 15], SamplingConfig(max_tokens=POSITIONS - 3), range(8), [])
    before = metric(fleet, "generation_tokens_total")

    def sampled() -> float:
        return metric(fleet, "generation_tokens_total") - before

    async def leave() -> None:
        async def ask() -> None:
            async with open_session(client.timeout_s) as session:
                async for _ in client.sample(session, body):
                    raise AssertionError("it should take longer")

        task = asyncio.create_task(ask())
        await asyncio.to_thread(wait_until, lambda: sampled() > 0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(leave())
    wait_until(lambda: metric(fleet, "num_requests_running") == 0)
    assert 0 < sampled() < 8 * (POSITIONS - 3) / 2
