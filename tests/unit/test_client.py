"""The client of a rollout server: how it reaches the server, and what it says when there is no answer."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlad_megatron.servers.client import ServerClient, ServerDownError, ServerTimeoutError, open_session

COMPLETION = b'{"choices": [{"token_ids": [3], "logprobs": {"token_logprobs": [-1]}, "finish_reason": "stop"}]}'


@pytest.fixture
def server():
    """The address of a server, and an event without which it answers nothing but GET."""
    may_answer = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            may_answer.wait(60)
            self.send_response(500 if self.path == "/collective_rpc" else 200)
            self.end_headers()
            self.wfile.write(COMPLETION)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", may_answer
        may_answer.set()
        http.shutdown()


async def complete(client):
    async with open_session(client.timeout_s) as session:
        return await client.complete(session, {})


def test_a_proxy_of_the_environment_is_not_asked(server, monkeypatch):
    url, may_answer = server
    may_answer.set()
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client = ServerClient(0, url, timeout_s=10)
    assert client.healthy()
    assert asyncio.run(complete(client)).tokens == [3]


def test_a_server_that_takes_too_long_is_named_with_what_helps(server):
    client = ServerClient(2, server[0], timeout_s=0.3)
    said = f"server 2 .{server[0]}. did not answer {{}} within rollout.request_timeout_s=0.3; raise it{{}}$"
    with pytest.raises(ServerTimeoutError, match=said.format("/pause", "")):
        client.pause()
    with pytest.raises(ServerTimeoutError, match=said.format("/v1/completions", ", or lower rollout.max_concurrency")):
        asyncio.run(complete(client))


def test_workers_without_the_recorder_name_the_flag(server):
    url, may_answer = server
    may_answer.set()
    said = (
        "answered 500 on /collective_rpc: .*; an external server needs --worker-extension-cls rlad_megatron.*Recorder"
    )
    with pytest.raises(ServerDownError, match=said):
        ServerClient(0, url, timeout_s=10).call_workers("record_fingerprints")
