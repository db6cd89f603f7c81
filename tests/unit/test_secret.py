"""The secret of a run: who may read it, and which requests it lets in."""

import asyncio
import multiprocessing
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlad_megatron.cli import main
from rlad_megatron.errors import ConfigError
from rlad_megatron.secret import admits, headers, read_token, shared_token


def test_all_processes_find_one_secret_that_only_the_user_can_read(tmp_path):
    os.umask(before := os.umask(0))
    try:
        os.umask(0)
        with ThreadPoolExecutor(8) as pool:
            (token,) = set(pool.map(shared_token, [tmp_path / "token"] * 8))
    finally:
        os.umask(before)
    assert len(token) == 64 and token != shared_token(tmp_path / "other")
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "token"]


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (None, 0, "cannot be read as a secret"),
        (b"", 0o600, "holds no secret"),
        (b" \n", 0o600, "holds no secret"),
        (b"\xff", 0o600, "cannot be read as a secret"),
        ("käse".encode(), 0o600, "holds no secret"),
        (b"a\nb", 0o600, "holds no secret"),
        (b"secret\n", 0o640, r"others may read this secret \(mode 640\); chmod 600 "),
    ],
)
def test_a_file_that_is_no_secret_is_named(tmp_path, content, mode, message):
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    with pytest.raises(ConfigError, match=f"^{file}: .*{message}"):
        read_token(file)


def test_only_requests_with_the_secret_are_let_in():
    def scope(**given):
        return {"headers": [(name.encode(), value.encode()) for name, value in given.items()]}

    assert admits(scope(accept="x", authorization="Bearer abc"), "abc")
    for given in ({}, {"authorization": "Bearer ab"}, {"authorization": "Bearer abcd"}, {"authorization": "abc"}):
        assert not admits(scope(**given), "abc")
    assert not admits({}, "abc")
    (name, value), *others = headers("abc").items()
    assert admits(scope(**{name.lower(): value}), "abc") and not others and headers("") == {}


def test_a_secret_without_servers_that_ask_for_it_is_refused(capsys, tmp_path):
    words = ["train", "kk_tiny_cpu", "eval.teacher=false", f"runs_dir={tmp_path}", f"rollout.token_file={tmp_path}/x"]
    assert main(words) == 2 and "rollout.token_file=" in capsys.readouterr().err
    assert main([*words, "rollout.urls=[http://127.0.0.1:1]"]) == 2
    assert f"{tmp_path}/x: cannot be read as a secret" in capsys.readouterr().err


ROUTES = [
    {"type": "http", "method": "POST", "path": path}
    for path in ("/rlad/sample", "/collective_rpc", "/health", "/", "/v1/completions")
]


def ask(token_file, connection):
    """In a process of its own: vLLM is large."""
    os.environ["RLAD_TOKEN_FILE"] = str(token_file)
    from rlad_megatron.servers.sampler import SampleRoute

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

    known = [(b"authorization", f"Bearer {read_token(token_file)}".encode())]
    strangers = [*ROUTES, {"type": "websocket", "path": "/v1/realtime"}]
    found = [asyncio.run(answer(scope | {"headers": []})) for scope in strangers]
    found += [asyncio.run(answer(scope | {"headers": known})) for scope in strangers[1:]]
    found.append(asyncio.run(answer({"type": "lifespan"})))
    connection.send(found)


def test_the_middleware_guards_every_route(tmp_path):
    pytest.importorskip("msgspec")  # vLLM's, which make test-compat does not have
    shared_token(tmp_path / "token")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=ask, args=(tmp_path / "token", theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    assert found[:6] == [([], [401])] * 5 + [([], [1008])]
    assert found[6:] == [(["http"], [])] * 4 + [(["websocket"], []), (["lifespan"], [])]
