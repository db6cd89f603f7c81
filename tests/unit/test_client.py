"""The client of a rollout server: how it reaches the server, and what it says when there is no answer."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlad_megatron.errors import RolloutError
from rlad_megatron.servers.client import (
    Completion,
    ServerClient,
    ServerDownError,
    ServerTimeoutError,
    open_session,
)
from rlad_megatron.servers.frames import FrameError, decode_frames, encode_error, encode_frame

LONG = Completion(list(range(1000)), [-index / 8 for index in range(1000)], "length", [("3", 990), ("4", 10)])
SHORT = Completion([2**31 - 1], [-0.10000000149011612], "stop", [("default", 1)])  # a log-prob that float32 holds
FRAMES = [encode_frame(2, LONG.finish_reason, LONG.tokens, LONG.log_probs, LONG.versions)]
FRAMES += [encode_frame(0, SHORT.finish_reason, SHORT.tokens, SHORT.log_probs, SHORT.versions)]


@pytest.fixture
def server():
    """The address of a server, an event without which it answers nothing but GET, and what it answers to a sample."""
    may_answer, answer = threading.Event(), [200, b""]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            may_answer.wait(60)
            self.send_response(500 if self.path == "/collective_rpc" else answer[0])
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", may_answer, answer
        may_answer.set()
        http.shutdown()


def sample(client, members):
    async def collect():
        async with open_session(client.timeout_s) as session:
            return [pair async for pair in client.sample(session, {"seeds": [0] * members})]

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


def test_a_stream_that_ends_within_a_frame_is_an_error():
    stream, first = b"".join(FRAMES), len(FRAMES[0])
    for length in (1, first - 1, first + 5, len(stream) - 1):
        with pytest.raises(FrameError, match="within a frame"):
            decoded(stream[:length], 4096)
    assert decoded(stream[:first], 4096) == [(2, LONG)]
    with pytest.raises(FrameError, match="the engine is gone"):
        decoded(FRAMES[0] + encode_error("the engine is gone"), 4096)


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


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(3, "stop", [5], [-1.0], [("1", 1)]),
        encode_frame(0, "stop", [5], [], [("1", 1)]),
        encode_frame(0, "stop", [5], [-1.0], []),
    ],
    ids=["member", "log_probs", "versions"],
)
def test_members_of_the_wrong_shape_are_refused(server, frame):
    url, may_answer, answer = server
    answer[1] = frame
    may_answer.set()
    with pytest.raises(RolloutError, match=r"gave member \d of 3 with 1 tokens, \d log-probs and \d weight versions$"):
        sample(ServerClient(0, url, timeout_s=10), 3)


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
