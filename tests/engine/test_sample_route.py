"""The sampling route, on an engine that the test scripts for what vLLM's on CPUs cannot do, and its guard."""

import asyncio
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from rlad_megatron.config import SamplingConfig
from rlad_megatron.errors import RolloutError
from rlad_megatron.models.registry import as_model_spec
from rlad_megatron.secret import TOKEN_FILE, shared_token
from rlad_megatron.servers.client import ServerClient
from rlad_megatron.servers.sampling import sampling_body

pytestmark = pytest.mark.engine

MODEL = as_model_spec(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 200,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "num_experts": 300,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    }
)
PROMPT, RESPONSE = [3, 14, 15], [9, 2, 6, 5]
ROUTED = np.arange(6 * 3 * 2, dtype=np.uint16).reshape(6, 3, 2) * 8


def engine(aux_output_config):
    """Answers as vLLM: a row of experts for each token but the last."""

    async def generate(prompt, params, request_id):
        output = SimpleNamespace(
            finish_reason="length",
            token_ids=RESPONSE,
            logprobs=SimpleNamespace(logprobs=[-0.5] * len(RESPONSE)),
            weight_versions=[SimpleNamespace(version="3", start=0, end=len(RESPONSE))],
            routed_experts=ROUTED if aux_output_config.enable_return_routed_experts else None,
        )
        yield SimpleNamespace(outputs=[output])

    return SimpleNamespace(
        generate=generate,
        model_config=SimpleNamespace(max_model_len=64),
        vllm_config=SimpleNamespace(aux_output_config=aux_output_config),
    )


def sample(vllm_engine, *, experts):
    from rlad_megatron.servers.sampler import SampleRoute

    async def with_engine(scope, receive, send):
        scope["app"] = SimpleNamespace(state=SimpleNamespace(engine_client=vllm_engine))
        await SampleRoute(None)(scope, receive, send)

    client = ServerClient(0, "http://server", timeout_s=10)
    client.replay = MODEL
    body = sampling_body(PROMPT, SamplingConfig(max_tokens=4), seeds=[1, 2], eos_ids=[], experts=experts)

    async def collect():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(with_engine)) as session:
            return [completion async for _, completion in client.sample(session, body)]

    return asyncio.run(collect())


@pytest.fixture
def no_secret(monkeypatch):
    monkeypatch.delenv("RLAD_TOKEN_FILE", raising=False)


def outputs(returns):
    from vllm.config.aux_output import AuxOutputConfig

    return AuxOutputConfig(enable_return_routed_experts=returns)


def test_experts_are_sent_if_they_are_asked_for(no_secret):
    first, second = sample(engine(outputs(True)), experts=True)
    for completion in (first, second):
        assert completion.tokens == RESPONSE and completion.versions == [("3", 4)]
        assert completion.experts.dtype == np.uint16 and np.array_equal(completion.experts, ROUTED)
    assert [completion.experts for completion in sample(engine(outputs(True)), experts=False)] == [None] * 2


def test_a_server_that_does_not_return_experts_refuses_by_name(no_secret):
    said = (
        "^server 0 .* answered 400 on /rlad/sample: .*router_replay=true asks for .* which this server does not "
        "return; start it with --enable-return-routed-experts, or use rollout.router_replay=false"
    )
    for aux_output_config in (outputs(False), None):
        vllm_engine = engine(outputs(False))
        vllm_engine.vllm_config.aux_output_config = aux_output_config
        with pytest.raises(RolloutError, match=said) as caught:
            sample(vllm_engine, experts=True)
        assert "\n" not in str(caught.value)
    assert len(sample(engine(outputs(False)), experts=False)) == 2


ROUTES = [
    {"type": "http", "method": "POST", "path": path}
    for path in ("/rlad/sample", "/collective_rpc", "/health", "/", "/v1/completions")
]


def test_the_middleware_guards_every_route(tmp_path, monkeypatch):
    from rlad_megatron.servers.sampler import SampleRoute

    monkeypatch.setenv(TOKEN_FILE, str(tmp_path / "token"))
    known = [(b"authorization", f"Bearer {shared_token(tmp_path / 'token')}".encode())]

    async def answer(scope):
        reached, sent = [], []

        async def app(scope, receive, send):
            reached.append(scope["type"])

        async def send(message):
            sent.append(message.get("status", message.get("code")))

        async def receive():
            return {"type": "http.request", "body": b"{}"}

        await SampleRoute(app)(scope, receive, send)
        return reached, sent[:1]

    websocket = {"type": "websocket", "path": "/v1/realtime"}
    for route in ROUTES:
        assert asyncio.run(answer(route | {"headers": []})) == ([], [401])
    assert asyncio.run(answer(websocket | {"headers": []})) == ([], [1008])
    for route in ROUTES[1:]:  # the first is the middleware's own
        assert asyncio.run(answer(route | {"headers": known})) == (["http"], [])
    assert asyncio.run(answer(websocket | {"headers": known})) == (["websocket"], [])
    assert asyncio.run(answer({"type": "lifespan"})) == (["lifespan"], [])
