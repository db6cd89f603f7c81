"""`POST /rlad/sample`, a route in vLLM's API server that samples one prompt's whole group.

vLLM's completions route takes a request for each member, and writes some hundred bytes of JSON for each token. This one
calls the engine directly. It answers with the frames of `servers/frames.py`, one when each member ends.

The body is the JSON of `Group`. An error before the first frame is a status and a text, as from vLLM's own routes; a
later one is a frame. A client that leaves aborts its members.

It is an ASGI middleware, which vLLM loads by `--middleware`. With RLAD_TOKEN_FILE it also guards all other routes: a
request without the secret in that file gets 401. Only vLLM's API server imports this module.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import msgspec
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rlad_megatron.secret import TOKEN_FILE, admits, read_token
from rlad_megatron.servers.frames import SAMPLE, encode_error, encode_frame


class Group(msgspec.Struct):
    """One prompt, and what is asked for."""

    prompt: list[int]
    seeds: Annotated[list[int], msgspec.Meta(min_length=1)]  # one for each member
    params: dict[str, Any]  # fields of vLLM's SamplingParams
    experts: bool = False  # whether to send the experts that were chosen


class SampleRoute:
    """The middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        file = os.environ.get(TOKEN_FILE)
        self._token = read_token(Path(file)) if file else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._token and scope["type"] != "lifespan" and not admits(scope, self._token):
            await _refuse(scope, receive, send)
            return
        if scope["type"] != "http" or scope["path"] != SAMPLE:
            await self._app(scope, receive, send)
            return
        body, stream = await _body(receive), _Stream(send)
        work = asyncio.create_task(_sample_group(scope["app"].state.engine_client, body, stream))
        left = asyncio.create_task(_client_left(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        except Exception as exception:
            error = create_error_response(exception).error
            if error.code >= 500:
                logging.getLogger(__name__).exception(SAMPLE)
            if stream.started:
                await stream.write(encode_error(error.message), more=False)
            else:
                response = JSONResponse({"error": error.model_dump()}, status_code=error.code)
                await response(scope, receive, send)
        finally:
            await _cancel(work, left)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 401, and to a WebSocket nothing."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        error = {"message": f"the secret of this server is missing or wrong ({TOKEN_FILE})"}
        await JSONResponse({"error": error}, status_code=401)(scope, receive, send)


class _Stream:
    """A response in parts. Its status goes out with the first one."""

    def __init__(self, send: Send) -> None:
        self._send, self.started = send, False

    async def write(self, part: bytes, *, more: bool = True) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200})
        await self._send({"type": "http.response.body", "body": part, "more_body": more})


async def _body(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _sample_group(engine: EngineClient, body: bytes, stream: _Stream) -> None:
    """Write the members' frames as they end. When one fails, or this is cancelled, the engine aborts the others."""
    group = msgspec.json.decode(body, type=Group)
    outputs = getattr(engine.vllm_config, "aux_output_config", None)  # not in earlier versions
    if group.experts and not (outputs and outputs.enable_return_routed_experts):
        raise VLLMValidationError(
            "rollout.router_replay=true asks for the experts that were chosen, which this server does not return; "
            "start it with --enable-return-routed-experts, or use rollout.router_replay=false"
        )
    members = [
        asyncio.create_task(_sample_member(engine, group, member, seed)) for member, seed in enumerate(group.seeds)
    ]
    try:
        for frame in asyncio.as_completed(members):
            await stream.write(await frame)
        await stream.write(b"", more=False)
    finally:
        await _cancel(*members)


async def _sample_member(engine: EngineClient, group: Group, member: int, seed: int) -> bytes:
    params = SamplingParams(
        **group.params,
        seed=seed,
        logprobs=0,  # only of the sampled token
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # nobody else has it
    )
    longest = engine.model_config.max_model_len
    if len(group.prompt) + params.max_tokens > longest:  # vLLM would silently sample fewer tokens
        raise VLLMValidationError(
            f"{len(group.prompt)} prompt tokens and max_tokens={params.max_tokens} exceed --max-model-len={longest}"
        )
    async for result in engine.generate(tokens_input(group.prompt), params, f"rlad-{uuid4().hex}"):
        (output,) = result.outputs
    if output.finish_reason not in ("stop", "length"):
        raise GenerationError(f"the engine ended a request with {output.finish_reason!r}")
    versions = [(span.version, span.end - span.start) for span in output.weight_versions or ()]
    experts = output.routed_experts if group.experts else None
    return encode_frame(member, output.finish_reason, output.token_ids, output.logprobs.logprobs, versions, experts)
