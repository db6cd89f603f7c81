"""The client of a rollout server: how it reaches the server, and what it says when there is no answer."""

import asyncio
import json
import resource
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from tiny_models import EXPERTS, SIZES

from rlad_megatron.config import RolloutConfig
from rlad_megatron.errors import RolloutError
from rlad_megatron.models.registry import as_model_spec
from rlad_megatron.servers.client import (
    Completion,
    ServerClient,
    ServerDownError,
    ServerTimeoutError,
    open_session,
)
from rlad_megatron.servers.frames import FrameError, decode_frames, encode_error, encode_frame
from rlad_megatron.servers.process import VllmServer

LONG = Completion(list(range(1000)), [-index / 8 for index in range(1000)], "length", [("3", 990), ("4", 10)])
SHORT = Completion([2**31 - 1], [-0.10000000149011612], "stop", [("default", 1)])  # a log-prob that float32 holds
FRAMES = [encode_frame(2, LONG.finish_reason, LONG.tokens, LONG.log_probs, LONG.versions)]
FRAMES += [encode_frame(0, SHORT.finish_reason, SHORT.tokens, SHORT.log_probs, SHORT.versions)]


class Served(tuple):
    """(address, event, answer), and as `given` the route and the secret of each request."""

    def __new__(cls, values, given):
        served = super().__new__(cls, values)
        served.given = given
        return served


@pytest.fixture
def server():
    """The address of a server, an event without which it answers nothing but GET, and what it answers."""
    may_answer, answer, given = threading.Event(), [200, b""], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            given.append((self.path, self.headers["Authorization"]))
            self.send_response(answer[0])
            self.end_headers()

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            given.append((self.path, self.headers["Authorization"]))
            may_answer.wait(60)
            self.send_response(500 if self.path == "/collective_rpc" else answer[0])
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()  # s until it sees its end
        yield Served((f"http://127.0.0.1:{http.server_port}", may_answer, answer), given)
        may_answer.set()
        http.shutdown()


def sample(client, members, max_tokens=1000, experts=False):
    body = {"prompt": [5, 6, 7], "params": {"max_tokens": max_tokens}, "seeds": [0] * members, "experts": experts}

    async def collect():
        async with open_session(client.timeout_s) as session:
            return [pair async for pair in client.sample(session, body)]

    return asyncio.run(collect())


def decoded(stream, piece):
    async def pieces():
        for start in range(0, len(stream), piece):
            yield stream[start : start + piece]

    async def collect():
        return [pair async for pair in decode_frames(pieces())]

    return asyncio.run(collect())


@pytest.mark.parametrize("piece", [1, 7, 4096, 100_000])
def test_frames_survive_the_way(piece):
    assert decoded(b"".join(FRAMES), piece) == [(2, LONG), (0, SHORT)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("piece", [1, 100_000])
def test_experts_survive_the_way(piece, dtype):
    experts = np.arange(3 * 5 * 2).reshape(3, 5, 2).astype(dtype) * 8 + np.iinfo(dtype).max - 8 * 29
    with_experts = encode_frame(1, "stop", [5, 9], [-1.0, 0.0], [("1", 2)], experts)
    (_, before), (member, found), (_, after) = decoded(FRAMES[0] + with_experts + FRAMES[1], piece)
    assert (member, found.tokens, found.log_probs) == (1, [5, 9], [-1.0, 0.0])
    assert found.experts.dtype == dtype and found.experts.max() == np.iinfo(dtype).max
    assert np.array_equal(found.experts, experts)
    assert (before, after) == (LONG, SHORT)


def test_a_stream_that_ends_within_a_frame_is_an_error():
    stream, first = b"".join(FRAMES), len(FRAMES[0])
    for length in (1, first - 1, first + 5, len(stream) - 1):
        with pytest.raises(FrameError, match="within a frame"):
            decoded(stream[:length], 4096)
    assert decoded(stream[:first], 4096) == [(2, LONG)]
    with pytest.raises(FrameError, match="the engine is gone"):
        decoded(FRAMES[0] + encode_error("the engine is gone"), 4096)


def test_the_limit_of_open_files_is_raised():
    code = (
        "import resource; from rlad_megatron.servers.client import raise_file_limit\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "raise_file_limit()\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_connections_leave_room_for_other_files(monkeypatch):
    """More requests at a time than files, to many servers, as in the check after a push: they take turns."""
    files, now, most = 16, [0], [0]
    monkeypatch.setattr(resource, "getrlimit", lambda which: (files, files))

    async def answer(reader, writer):
        now[0] += 1
        most[0] = max(most[0], now[0])
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.read()  # until the client closes
        now[0] -= 1
        writer.close()

    async def ask():
        servers = [await asyncio.start_server(answer, "127.0.0.1", 0) for _ in range(12)]
        urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
        async with open_session(60.0) as session:
            answers = await asyncio.gather(*(session.get(url) for url in urls * 2))
        while now[0]:
            await asyncio.sleep(0)
        return [each.status_code for each in answers]

    assert asyncio.run(ask()) == [200] * 24
    assert most[0] <= files // 2


def test_a_proxy_of_the_environment_is_not_asked(server, monkeypatch):
    url, may_answer, answer = server
    answer[1] = FRAMES[1]
    may_answer.set()
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client = ServerClient(0, url, timeout_s=10)
    assert client.healthy()
    assert sample(client, 1) == [(0, SHORT)]


def test_a_group_that_is_not_whole_is_a_server_that_is_down(server):
    url, may_answer, answer = server
    client = ServerClient(4, url, timeout_s=10)
    may_answer.set()
    answer[1] = b"".join(FRAMES)
    for members, text in ((3, r"members \[1\] are missing"), (5, r"members \[1, 3, 4\] are missing")):
        with pytest.raises(ServerDownError, match=rf"server 4 .{url}. broke off /rlad/sample: {text}; see its log"):
            sample(client, members)
    answer[1] = FRAMES[0] + encode_error("the engine is gone")
    with pytest.raises(ServerDownError, match="server 4 .*/rlad/sample: the engine is gone; see its log"):
        sample(client, 3)


def frame(member=0, reason="stop", tokens=(5, 9), log_probs=(-1.0, 0.0), versions=(("1", 2),), experts=None):
    return encode_frame(member, reason, tokens, log_probs, versions, experts)


def header_with(experts):
    start = b'{"member": 0, "tokens": 1, "log_probs": 1, "finish_reason": "stop", "versions": [["1", 1]], "experts": '
    return start + experts + b"}\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (frame(member=3), "with member 3, which is not asked for$"),
        (frame() + frame(), "with member 0, which is not asked for$"),
        (frame(log_probs=[-1.0]), "with 2 tokens, 1 log-probs and 2 weight versions"),
        (frame(versions=[]), "with 2 tokens, 2 log-probs and 0 weight versions"),
        (frame(tokens=[], log_probs=[], versions=[]), "with 0 tokens, where 1 to 3 were asked for"),
        (frame(tokens=[1] * 4, log_probs=[-1.0] * 4, versions=[("1", 4)]), "with 4 tokens, where 1 to 3 were asked"),
        (frame(tokens=[5, 100]), "with token 100, which is not in the model's vocabulary of 100"),
        (frame(tokens=[-1, 5]), "with token -1, which is not in"),
        (frame(log_probs=[-1.0, float("nan")]), "with log-prob nan at token 1; it must be finite and at most 0"),
        (frame(log_probs=[-float("inf"), -1.0]), "with log-prob -inf at token 0"),
        (frame(log_probs=[-1.0, 0.5]), "with log-prob 0.5 at token 1"),
        (frame(reason="abort"), "with finish_reason 'abort', which is none of stop, length"),
        (frame(versions=[("mine", 2)]), "with weight version 'mine', which this run has not pushed"),
        (b"<html>\n" + b"x" * 100_000, "with something else: <html>; see its log"),
        (b"x" * 2_000_000, "with something else: x{300}; see its log"),
        (b'{"choices": []}\n', r"with something else: ..choices.: \[\]."),
        (b'{"member": 0, "tokens": -4, "log_probs": 0, "finish_reason": "stop", "versions": []}\n', "something else"),
        (b'{"member": 0, "tokens": 1e9, "log_probs": 0, "finish_reason": "stop", "versions": []}\n', "something else"),
        (
            b'{"member": 0, "tokens": 0, "log_probs": 0, "finish_reason": "", "versions": [["1", Infinity]]}\n',
            "something else",
        ),
        *((header_with(experts), "something else") for experts in (b'["float32", [1]]', b'["uint8", [1, -2]]', b"7")),
        (header_with(b'["uint8", [999, 9999, 9999]]'), "something else"),
        (b"[" * 100_000 + b"\n", "something else"),
        (b"[]\n", "something else"),
        (b"\xff\xfe", "something else"),
    ],
)
def test_an_answer_that_cannot_be_is_one_line_that_names_the_server(server, answer, message):
    url, may_answer, given = server
    given[1] = answer
    may_answer.set()
    client = ServerClient(7, url, timeout_s=10)
    client.vocab_size = 100
    with pytest.raises(RolloutError, match=rf"^server 7 .{url}. answered /rlad/sample .*{message}") as caught:
        sample(client, 2, max_tokens=3)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


MOE = as_model_spec({"model_type": "qwen3_moe", **SIZES, **EXPERTS})  # 7 layers, 4 experts, 2 for each token


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (
            None,
            "no experts, for which rollout.router_replay=true asks; if it is one of rollout.urls, it needs this",
        ),
        (
            np.zeros((5, 7, 2), np.uint8),
            r"experts of shape \(5, 7, 2\), where \(4, 7, 2\) \(tokens, layers, experts of",
        ),
        (np.zeros((4, 6, 2), np.uint8), r"experts of shape \(4, 6, 2\), where"),
        (np.full((4, 7, 2), 4, np.uint8), "expert 4, which is not one of the model's 4 "),
    ],
)
def test_experts_that_cannot_be_the_models_are_refused(server, experts, message):
    url, may_answer, answer = server
    may_answer.set()
    client = ServerClient(7, url, timeout_s=10)
    client.replay = MOE
    answer[1] = frame(experts=experts)
    with pytest.raises(RolloutError, match=rf"^server 7 .{url}. answered /rlad/sample .* with {message}") as caught:
        sample(client, 1, experts=True)
    assert "\n" not in str(caught.value)
    assert len(sample(client, 1)) == 1  # an evaluation does not ask for them
    answer[1] = frame(experts=np.full((4, 7, 2), 3, np.uint8))
    ((_, found),) = sample(client, 1, experts=True)
    assert found.experts.shape == (4, 7, 2)


@pytest.mark.parametrize(
    "text", [b"<html>" + b"y" * 100_000, b"[1]", b"{}", b'{"results": ', b'{"success": "yes"}', b"[" * 100_000]
)
def test_an_answer_without_what_was_asked_for_names_the_server(server, text):
    url, may_answer, given = server
    given[:] = 200, text
    may_answer.set()
    said = rf"^server 7 .{url}. answered /reset_prefix_cache without 'success' .bool.: .*; is it a vLLM server"
    with pytest.raises(RolloutError, match=said) as caught:
        ServerClient(7, url, timeout_s=10).reset_prefix_cache()
    assert len(str(caught.value)) < 500


def test_every_request_carries_the_secret(server):
    url, may_answer, answer = server
    may_answer.set()
    answer[:] = 200, FRAMES[1]
    client = ServerClient(0, url, timeout_s=10, token="s3cret")
    assert client.healthy() and sample(client, 1) == [(0, SHORT)]
    client.pause()
    ServerClient(0, url, timeout_s=10).pause()
    asked = [(route, given) for route, given in server.given]
    assert asked == [(route, "Bearer s3cret") for route in ("/health", "/rlad/sample", "/pause?mode=keep")] + [
        ("/pause?mode=keep", None)
    ]
    answer[:] = 401, b"{}"
    with pytest.raises(
        RolloutError, match="answered 401 on /pause: .*; give the file with its secret as rollout.token_"
    ):
        client.pause()


def test_a_server_whose_secret_is_missing_is_not_waited_for(server):
    server[2][:] = 401, b"{}"
    external = VllmServer(RolloutConfig(startup_timeout_s=600), 0, server[0], token="another")
    said = "answered 401 on /health: .*; give the file with its secret as rollout.token_file"
    for action in (external.wait_ready, external.alive):
        with pytest.raises(RolloutError, match=said):
            action()
    server[2][0] = 503
    assert not external.alive()


def test_a_refusal_says_what_is_missing(server):
    url, may_answer, answer = server
    may_answer.set()
    client = ServerClient(0, url, timeout_s=10)
    answer[:] = 404, b'{"detail": "Not Found"}'
    said = "answered 404 on /rlad/sample: .*; an external server needs --middleware rlad_megatron.*SampleRoute$"
    with pytest.raises(RolloutError, match=said):
        sample(client, 1)
    answer[:] = 400, json.dumps({"error": {"message": "too long"}}).encode()
    with pytest.raises(RolloutError, match=r"answered 400 on /rlad/sample: .*too long\W*$"):
        sample(client, 1)
    answer[0] = 500
    with pytest.raises(ServerDownError, match=r"answered 500 on /rlad/sample: .*too long\W*$"):
        sample(client, 1)


def test_a_server_that_takes_too_long_is_named_with_what_helps(server):
    client = ServerClient(2, server[0], timeout_s=0.3)
    said = f"server 2 .{server[0]}. did not answer {{}} within rollout.request_timeout_s=0.3; raise it{{}}$"
    with pytest.raises(ServerTimeoutError, match=said.format("/pause", "")):
        client.pause()
    with pytest.raises(ServerTimeoutError, match=said.format("/rlad/sample", ", or lower rollout.max_concurrency")):
        sample(client, 1)


def test_workers_without_the_recorder_name_the_flag(server):
    url, may_answer, _ = server
    may_answer.set()
    said = (
        "answered 500 on /collective_rpc: .*; an external server needs --worker-extension-cls rlad_megatron.*Recorder"
    )
    with pytest.raises(ServerDownError, match=said):
        ServerClient(0, url, timeout_s=10).call_workers("record_fingerprints")
