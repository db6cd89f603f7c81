"""The teacher on dedicated ranks: rank 0 of their world answers HTTP requests, and all of them score.

`POST /log_probs` takes and returns safetensors (`client.py`). uvicorn runs in a thread; requests are scored one after
the other in the main thread, which owns the device. The service listens where rollout servers do: on this machine
only, or in the cluster's network. A request without the run's secret gets 401.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any

import torch.distributed as dist
import uvicorn

from rlad_megatron.config import RunConfig
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.parallel.collective import barrier, on_first_rank
from rlad_megatron.parallel.groups import build_groups, seed_everything
from rlad_megatron.secret import admits
from rlad_megatron.teacher.client import ROUTE, decode_samples, encode_log_probs
from rlad_megatron.teacher.teacher import Teacher, build_teacher
from rlad_megatron.types import Sample

# Without a request, rank 0 tells the other ranks this often that it is alive. While the trainer generates, evaluates or
# saves there are no requests, and a collective that a rank never joins fails after train.distributed_timeout_s.
IDLE_S = 10.0
CLOSE_S = 5  # how long `close` waits for clients that have begun a request and not finished sending it


def serve_teacher(config: RunConfig, host: str, announce: Callable[[str], None], token: str) -> None:
    """Load the teacher and answer requests until this process is killed. Collective over the teacher's world.

    announce: called on rank 0 with the URL when every rank is ready. token: the secret to ask for.
    """
    groups = build_groups(config.teacher.layout, config.train.distributed_timeout_s)
    seed_everything(config.train.seed, groups)
    teacher = build_teacher(config, config.teacher, read_model_spec(config.teacher.path), groups)
    barrier(dist.group.WORLD)
    service = None
    if dist.get_rank() == 0:
        service = TeacherService(host, token)
        announce(service.url)
        print(f"the teacher answers at {service.url}", flush=True)
    try:
        while True:
            answer_next(teacher, service, dist.group.WORLD)
    finally:
        if service is not None:
            service.close()


def answer_next(teacher: Teacher, service: TeacherService | None, group: dist.ProcessGroup | None) -> None:
    """Score the next request, or return after IDLE_S without one. Collective; only rank 0 has a `service`.

    An error of the teacher is the request's answer, and is raised too: the ranks cannot go on after it.
    """
    answer: Future[bytes] = Future()  # never read on the other ranks

    def next_samples() -> list[Sample] | None:
        nonlocal answer
        assert service is not None
        samples, answer = service.next_request(IDLE_S)
        return samples

    samples = on_first_rank(next_samples, group)
    if samples is None:
        return
    try:
        answer.set_result(encode_log_probs(teacher.log_probs(samples)))
    except BaseException as error:  # also an interrupt, which must not reach uvicorn's thread as such
        answer.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
        raise


class TeacherService:
    """The HTTP server of rank 0. The main thread takes the requests and sets their answers."""

    def __init__(self, host: str, token: str) -> None:
        self._token = token
        self._requests: queue.Queue[tuple[list[Sample], Future[bytes]]] = queue.Queue()
        listener = socket.create_server((host, 0))  # the system chooses a free port
        self.url = f"http://{host}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            lifespan="off",
            ws="none",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            log_level="warning",
            timeout_graceful_shutdown=CLOSE_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def next_request(self, timeout_s: float) -> tuple[list[Sample] | None, Future[bytes]]:
        """The samples of the next request, or None if none arrives in time; and its answer, to be set."""
        try:
            return self._requests.get(timeout=timeout_s)
        except queue.Empty:
            return None, Future()

    def close(self) -> None:
        """Accept no more connections, and fail the requests that will not be answered."""
        self._server.should_exit = True
        while self._thread.is_alive():  # until the requests that have begun have their answers
            self.next_request(0.1)[1].set_exception(RuntimeError("its ranks have exited"))

    async def _app(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if admits(scope, self._token):
            status, content = await self._respond(f"{scope['method']} {scope['path']}", receive)
        else:
            status, content = HTTPStatus.UNAUTHORIZED, b"the run's secret is missing or wrong"
        headers = [(b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": int(status), "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _respond(self, route: str, receive: Receive) -> tuple[HTTPStatus, bytes]:
        if route != f"POST {ROUTE}":
            return HTTPStatus.NOT_FOUND, f"no route {route}; use POST {ROUTE}".encode()
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            samples = decode_samples(bytes(body))
        except Exception as error:  # of many kinds; a malformed request must not end the teacher
            return HTTPStatus.BAD_REQUEST, f"the body does not hold samples: {error}".encode()
        future: Future[bytes] = Future()
        self._requests.put((samples, future))
        try:
            return HTTPStatus.OK, await asyncio.wrap_future(future)
        except RuntimeError as error:
            return HTTPStatus.INTERNAL_SERVER_ERROR, str(error).encode()


Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
