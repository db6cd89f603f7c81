"""The secret of a run: who may read it, and which requests it lets in."""

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
