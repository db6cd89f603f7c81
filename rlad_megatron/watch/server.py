"""`rlad watch RUN`: serves the page that follows a run folder, also of a run on another host of a shared file system.

Only reads, and only what the page shows. It listens on 127.0.0.1, and all its routes are below a random path: others on
the machine reach the port, but not the run's prompts. docs/security.md says what else it refuses.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from rlad_megatron.config import RunConfig
from rlad_megatron.config.recipe import from_yaml
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.launch.lock import STALE_S
from rlad_megatron.observe.metrics import METRICS_FILE
from rlad_megatron.observe.page import ASSETS, asset, live_page, live_policy, run_facts
from rlad_megatron.observe.rollout_index import Filter
from rlad_megatron.observe.run_folder import RunFolder
from rlad_megatron.trainer.run_state import CONFIG, LOCK

HOST = "127.0.0.1"
MOST_ROWS = 200  # of one answer
INDEX_S = 1.0  # of an answer, for rollouts of earlier steps
HEADERS = {
    "Content-Security-Policy": live_policy(),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # addresses hold the random path
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def watch(path: Path, port: int) -> None:
    """Serve the page of a run folder until Ctrl-C.

    Raises ConfigError if the folder cannot be one of a run, or the port is taken.
    """
    check_folder(path)
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise ConfigError(f"--port={port}: cannot listen on {HOST} ({error.strerror}); use another port") from None
    secret = secrets.token_urlsafe(24)
    print(f"watching {path}; open http://{HOST}:{listener.getsockname()[1]}/{secret}/ and stop with Ctrl-C", flush=True)
    config = uvicorn.Config(
        application(path, secret), lifespan="off", ws="none", proxy_headers=False, access_log=False, log_level="warning"
    )
    with suppress(KeyboardInterrupt):  # the usual end
        uvicorn.Server(config).run(sockets=[listener])


def check_folder(path: Path) -> None:
    """Raise ConfigError for a folder of several runs, or a missing one that no run will make."""
    if path.is_dir():
        # A folder without config.yaml may be that of a run to come: `rlad bench` and others write theirs before.
        runs = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
        if runs and not (path / CONFIG).exists():
            raise ConfigError(f"RUN={path}: holds no run but folders of runs; give one of them: {', '.join(runs[:5])}")
    elif path.exists() or not path.parent.is_dir():
        raise ConfigError(f"RUN={path}: no such folder; give a run's folder, runs/NAME")


def application(path: Path, secret: str) -> Starlette:
    """The ASGI application. secret: the first part of every path."""
    run = WatchedRun(path.resolve())  # for a name, also if it is "."
    routes = [
        Route("/", run.page),
        Route("/static/{name}", _asset),
        Route("/news", _answering(run.news)),
        Route("/rollouts", _answering(run.rollouts)),
        Route("/rollout", _answering(run.rollout)),
    ]
    # A page of another site could reach this port by a name of its own that it lets point here (DNS rebinding).
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    return Starlette(routes=[Mount(f"/{secret}", routes=routes)], middleware=[hosts])


class NotFoundError(Exception):
    """A request for what the page does not ask for."""


class WatchedRun:
    """What the routes answer. Requests come in several threads, and a lock lets one at a time read the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = RunFolder(path)
        self._lock = threading.Lock()
        self._config: tuple[float, RunConfig | None, str] = 0.0, None, ""

    def page(self, request: Request) -> Response:
        return HTMLResponse(live_page(self.path.name), headers=HEADERS)

    def news(self, query: dict[str, str]) -> dict[str, Any]:
        """What the run has written since the answer that had this `count` and these versions."""
        after, restarts, load = (_number(query, name) for name in ("after", "restarts", "load"))
        with self._lock:
            self._folder.poll(INDEX_S)
            config, problem = self._read_config()
            news = self._folder.news(after, restarts, config, self._disk(), load)
            state = problem or self._state(config)
            version = str(self._config[0])
        facts = run_facts(self.path, config, state=state, age=self._age()) | {"config_version": version}
        if query.get("config") == version:
            facts["config"] = None  # as it was
        return {"facts": facts, "news": news}

    def rollouts(self, query: dict[str, str]) -> dict[str, Any]:
        """Some rows of the list of rollouts, and how many there are."""
        wanted = Filter(
            text=query.get("text", ""),
            step=_number(query, "step") if query.get("step") else None,
            solved={"true": True, "false": False}.get(query.get("solved", "")),
            subset=query.get("subset"),
        )
        start, size = max(_number(query, "start"), 0), min(max(_number(query, "size"), 0), MOST_ROWS)
        with self._lock:
            found, rows = self._folder.rollouts.page(wanted, start, size)
        return {"found": found, "rows": rows}

    def rollout(self, query: dict[str, str]) -> dict[str, Any]:
        """One rollout with its tokens."""
        number = _number(query, "number")
        with self._lock:
            rollout = self._folder.rollouts.get(query.get("file", ""), number)
        if rollout is None:
            raise NotFoundError("no such rollout, or its file has changed")
        return rollout

    def _read_config(self) -> tuple[RunConfig | None, str]:
        """The run's configuration, None before there is one; and what is wrong with it."""
        file = self.path / CONFIG
        with suppress(FileNotFoundError):
            changed = file.stat().st_mtime
            if changed != self._config[0]:
                try:
                    self._config = changed, from_yaml(file), ""
                except ConfigError as error:  # of another version: the figures can be shown without it
                    self._config = changed, None, str(error)
        return self._config[1:]

    def _state(self, config: RunConfig | None) -> str:
        with suppress(FileNotFoundError):
            silent = time.time() - (self.path / LOCK).stat().st_mtime
            return "running" if silent < STALE_S else f"stopped (no sign of life for {_in_words(silent)})"
        if config is None:
            return "not begun"
        # Either alone is not its end: a report may be of fewer steps, and the export comes after the last step.
        reported = (self.path / config.report.name).exists()
        return "ended" if reported and self._folder.has_all_steps(config) else "stopped"

    def _age(self) -> str:
        with suppress(FileNotFoundError):
            return f"{_in_words(time.time() - (self.path / METRICS_FILE).stat().st_mtime)} ago"
        return ""

    def _disk(self) -> tuple[int, int] | None:
        with suppress(FileNotFoundError):
            usage = shutil.disk_usage(self.path)
            return usage.free, usage.total
        return None


def _answering(function: Callable[[dict[str, str]], dict[str, Any]]) -> Callable[[Request], Response]:
    """A route whose answer is JSON, or an error as text."""

    def answer(request: Request) -> Response:
        try:
            return JSONResponse(function(dict(request.query_params)), headers=HEADERS)
        except (DataError, OSError) as error:  # the page shows it, and asks again
            return PlainTextResponse(str(error), 500, headers=HEADERS)
        except NotFoundError as error:
            return PlainTextResponse(str(error), 404, headers=HEADERS)

    return answer


def _number(query: dict[str, str], name: str) -> int:
    try:
        return int(query[name])
    except (KeyError, ValueError):
        raise NotFoundError(f"{name}={query.get(name)} is no whole number") from None


def _asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in ASSETS:
        return PlainTextResponse("no such file", 404, headers=HEADERS)
    kind = "text/css" if name.endswith(".css") else "text/javascript"
    return Response(asset(name), media_type=kind, headers=HEADERS)


def _in_words(seconds: float) -> str:
    seconds = max(seconds, 0.0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
