"""Requests to rollout servers: their lengths, seeds and bodies."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import httpx

from rlad_megatron.config import RunConfig, SamplingConfig
from rlad_megatron.data.prompts import DROPPED_SHARE, build_prompts
from rlad_megatron.data.tokenizers import Tokenizer
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.servers.client import ServerClient, open_session
from rlad_megatron.servers.frames import Completion
from rlad_megatron.types import Prompt

PROBE_PROMPTS = 8  # decoded after each sync and compared with the trainer
PROBE_TOKENS = 4  # after each of them: a few steps, because a step takes as long for one prompt as for several
CANARY_TOKENS = 32  # at most, at a server's start: the first tokens may be near-certain, whatever the weights
SEEDS_PER_RUN = 1_000_003  # so that runs with different `train.seed` share none


def longest_response(config: RunConfig) -> int:
    """Tokens that a server must have room for after the longest prompt."""
    return max(config.rollout.sampling.max_tokens, config.eval.sampling.max_tokens, PROBE_TOKENS)


def fitting_prompts(
    config: RunConfig, specs: Mapping[str, ModelSpec], tokenizer: Tokenizer, split: str
) -> tuple[list[Prompt], int]:
    """The prompts of one split ("train" or "test") that fit, and how many were dropped. specs: of `read_specs`.

    A prompt fits if it has at most `data.max_prompt_tokens` tokens, and if student and teacher have positions for it
    and the longest response.
    Raises ConfigError if more than a tenth would be dropped, and as `build_prompts` does.
    """
    prompts = build_prompts(config.data, tokenizer, split)
    most, response = config.data.max_prompt_tokens, longest_response(config)
    positions, role = min((spec.max_position_embeddings, role) for role, spec in specs.items())
    room = positions - response
    limit = min(room, most or room)
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= limit]
    dropped = len(prompts) - len(kept)
    if dropped * DROPPED_SHARE > len(prompts):
        longest = max(prompts, key=lambda prompt: len(prompt.tokens))
        if limit < room:
            why, remedy = f"data.max_prompt_tokens={most}", "raise it"
        else:
            why = f"the {positions} positions of the {role} minus a response of {response}"
            remedy = "lower rollout.sampling.max_tokens and eval.sampling.max_tokens"
        raise ConfigError(
            f"{dropped} of {len(prompts)} prompts to {split} on, more than a tenth, exceed {limit} tokens ({why}); the "
            f"longest, {longest.id!r}, has {len(longest.tokens)}; {remedy}, or shorten the prompts"
        )
    return kept, dropped


def max_model_len(config: RunConfig, prompts: Iterable[Prompt]) -> int:
    """Tokens of the longest prompt and of the longest response together."""
    return max(len(prompt.tokens) for prompt in prompts) + longest_response(config)


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
