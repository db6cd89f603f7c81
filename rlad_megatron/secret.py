"""The secret of a run, without which its servers and its teacher answer nothing.

It is the text of a file that only the user can read. A request carries it as `Authorization: Bearer SECRET`.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlad_megatron.errors import ConfigError

TOKEN_FILE = "RLAD_TOKEN_FILE"  # environment variable of a server: the path


def shared_token(file: Path) -> str:
    """The secret in a file that several processes name; the first of them makes it."""
    if not file.exists():
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)  # mode 0600
        with open(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(temporary, file)
        os.unlink(temporary)
    return read_token(file)


def read_token(file: Path) -> str:
    """Raises ConfigError if the file is not there, is empty, or can be read by others."""
    try:
        token = file.read_text().strip()
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as a secret ({error}); see docs/security.md") from None
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{file}: holds no secret; write one line of ASCII, for example by `openssl rand -hex 32`")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{file}: others may read this secret (mode {mode & 0o777:o}); chmod 600 {file}")
    return token


def headers(token: str) -> dict[str, str]:
    """Of a request. token: empty for a server that asks for none."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def admits(scope: Mapping[str, Any], token: str) -> bool:
    """Whether a request, as ASGI describes it, carries the secret."""
    given: Iterable[tuple[bytes, bytes]] = scope.get("headers", ())
    expected = f"Bearer {token}".encode()
    return any(name.lower() == b"authorization" and hmac.compare_digest(value, expected) for name, value in given)
