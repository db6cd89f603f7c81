"""Requests to rollout servers: their lengths, seeds and bodies."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import httpx

from rlad_megatron.config import RunConfig, SamplingConfig
from rlad_megatron.data.prompts import DROPPED_SHARE
from rlad_megatron.data.table import Prompts
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.servers.client import ServerClient, open_session
from rlad_megatron.servers.frames import Completion

PROBE_PROMPTS = 8  # decoded after each sync and compared with the trainer
PROBE_TOKENS = 4  # after each of them: a few steps, because a step takes as long for one prompt as for several
CANARY_TOKENS = 32  # at most, at a server's start: the first tokens may be near-certain, whatever the weights
SEEDS_PER_RUN = 1_000_003  # so that runs with different `train.seed` share none


def longest_response(config: RunConfig) -> int:
    """Tokens that a server must have room for after the longest prompt."""
    return max(config.rollout.sampling.max_tokens, config.eval.sampling.max_tokens, PROBE_TOKENS)


def fitting_prompts(
    config: RunConfig, specs: Mapping[str, ModelSpec], prompts: Prompts, split: str
) -> tuple[Prompts, int]:
    """The prompts that fit, and how many were dropped. split: "train" or "test". specs: of `read_specs`.

    A prompt fits if it has at most `data.max_prompt_tokens` tokens, and if student and teacher have positions for it
    and the longest response.
    Raises ConfigError if more than a tenth would be dropped, or if there are none.
    """
    limit, why, remedy = prompt_limit(config, specs)
    lengths = prompts.lengths
    kept = prompts.select(lengths <= limit)
    dropped = len(prompts) - len(kept)
    if dropped * DROPPED_SHARE > len(prompts):
        longest = int(lengths.argmax())
        raise ConfigError(
            f"{dropped} of {len(prompts)} prompts to {split} on, more than a tenth, exceed {limit} tokens ({why}); the "
            f"longest, {prompts[longest].id!r}, has {lengths[longest]}; {remedy}, or shorten the prompts"
        )
    if not kept:
        raise ConfigError(f"data.source={config.data.source}: no prompts to {split} on; add lines or puzzles")
    return kept, dropped


def prompt_limit(config: RunConfig, specs: Mapping[str, ModelSpec]) -> tuple[int, str, str]:
    """Most tokens of a prompt, what sets this limit, and how to raise it."""
    most, response = config.data.max_prompt_tokens, longest_response(config)
    positions, role = min((spec.max_position_embeddings, role) for role, spec in specs.items())
    room = positions - response
    if most and most < room:
        return most, f"data.max_prompt_tokens={most}", "raise it"
    why = f"the {positions} positions of the {role} minus a response of {response}"
    return room, why, "lower rollout.sampling.max_tokens and eval.sampling.max_tokens"


def max_model_len(config: RunConfig, *splits: Prompts) -> int:
    """Tokens of the longest prompt and of the longest response together."""
    return max(int(prompts.lengths.max()) for prompts in splits) + longest_response(config)


def request_seed(seed: int, prompt: int, member: int) -> int:
    """Seed of one request: the first 8 bytes of blake2b("seed/prompt/member"), without the sign bit.

    It depends only on the response's place in the batch, so neither timing nor the choice of server changes what is
    sampled. (Batches of different composition still differ in floating point, which rarely moves a token.)
    """
    digest = hashlib.blake2b(f"{seed}/{prompt}/{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sampling_body(
    tokens: Sequence[int],
    sampling: SamplingConfig,
    seeds: Sequence[int],
    eos_ids: Sequence[int],
    *,
    experts: bool = False,
) -> dict[str, Any]:
    """What `ServerClient.sample` sends: one response to the prompt for each seed.

    experts: also ask for the experts that were chosen.
    """
    params = {
        **asdict(sampling),  # the fields have the names of vLLM's parameters
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,  # only `stop_token_ids` end a response, whatever the checkpoint's configuration says
    }
    return {"prompt": list(tokens), "seeds": list(seeds), "params": params, "experts": experts}


def decode_greedily(
    clients: Sequence[ServerClient], prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[Completion]]:
    """Each server's greedy continuation of each prompt, `num_tokens` long: [clients][prompts].

    With the experts that were chosen, if clients have a model to replay.
    """
    greedy = SamplingConfig(temperature=0.0, max_tokens=num_tokens)
    experts = clients[0].replay is not None
    bodies = [sampling_body(tokens, greedy, seeds=[0], eos_ids=(), experts=experts) for tokens in prompts]

    async def ask(session: httpx.AsyncClient, client: ServerClient, body: dict[str, Any]) -> Completion:
        (answer,) = [completion async for _, completion in client.sample(session, body)]
        return answer

    async def ask_all() -> list[Completion]:
        async with open_session(clients[0].timeout_s) as session:
            return await asyncio.gather(*(ask(session, client, body) for client in clients for body in bodies))

    answers = iter(asyncio.run(ask_all()))
    return [list(islice(answers, len(bodies))) for _ in clients]
