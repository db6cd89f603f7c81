"""The teacher on ranks of its own: rank 0 of their world takes requests over HTTP, and all of them score.

`POST /log_probs` takes and gives safetensors (`client.py`). Requests are answered one after the other. It
listens where rollout servers do: on this machine alone, or in the cluster's network, which has to be trusted.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import torch.distributed as dist

from rlad_megatron.config import RunConfig
from rlad_megatron.parallel.collective import barrier, on_first_rank
from rlad_megatron.parallel.groups import build_groups, seed_everything
from rlad_megatron.teacher.client import ROUTE, decode_samples, encode_log_probs
from rlad_megatron.teacher.teacher import Teacher, build_teacher
from rlad_megatron.types import Sample

# Rank 0 lets the others know that it lives, for nobody asks while the trainer generates, evaluates or saves, and a
# collective that nobody joins ends after train.distributed_timeout_s.
IDLE_S = 10.0


def serve_teacher(config: RunConfig, host: str, announce: Callable[[str], None]) -> None:
    """Load the teacher and answer until this process is ended. Collective over the teacher's world.

    announce: called on rank 0 with the URL when every rank is ready.
    """
    groups = build_groups(config.teacher.layout)
    seed_everything(config.train.seed, groups)
    teacher = build_teacher(config, config.teacher, groups)
    barrier(dist.group.WORLD)
    service = None
    if dist.get_rank() == 0:
        service = TeacherService(host)
        announce(service.url)
        print(f"the teacher answers at {service.url}", flush=True)
    try:
        while True:
            answer_next(teacher, service, dist.group.WORLD)
    finally:
        if service is not None:
            service.close()


def answer_next(teacher: Teacher, service: TeacherService | None, group: dist.ProcessGroup | None) -> None:
    """Score the next request, or return after IDLE_S without one. Collective; `service` on rank 0 alone.

    What the teacher raises is the request's answer, and raised on: a rank that has failed is in no state to go on.
    """
    samples = on_first_rank(lambda: service.next_request(IDLE_S), group)
    if samples is None:
        return
    try:
        log_probs = teacher.log_probs(samples)
    except Exception as error:
        if service is not None:
            service.fail(error)
        raise
    if service is not None:
        service.answer(log_probs)


class TeacherService:
    """The HTTP server of rank 0, in threads of its own; the scoring stays in the main thread, with its device."""

    def __init__(self, host: str) -> None:
        self._requests: queue.Queue[tuple[list[Sample], Future]] = queue.Queue()
        self._pending: Future | None = None
        self._server = _Server(host, self._requests)
        self.url = f"http://{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def next_request(self, timeout_s: float) -> list[Sample] | None:
        """The samples of the next request, which `answer` or `fail` is to end; None if there is none for so long."""
        try:
            samples, self._pending = self._requests.get(timeout=timeout_s)
        except queue.Empty:
            return None
        return samples

    def answer(self, log_probs: list[torch.Tensor]) -> None:
        """log_probs: float32 [R] of each sample."""
        self._pending.set_result(encode_log_probs(log_probs))
        self._pending = None

    def fail(self, error: Exception) -> None:
        self._pending.set_exception(error)
        self._pending = None

    def close(self) -> None:
        """Take no more requests, and end those that nobody will answer."""
        self._server.shutdown()
        if self._pending is not None:
            self.fail(_ended())
        threading.Thread(target=self._refuse_all, daemon=True).start()
        self._server.server_close()

    def _refuse_all(self) -> None:
        """For ever: a handler may still be reading a request, and `server_close` waits for each of them."""
        while True:
            _, future = self._requests.get()
            future.set_exception(_ended())


def _ended() -> ConnectionError:
    return ConnectionError("the teacher's ranks have ended")


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # `close` waits until what was answered is sent

    def __init__(self, host: str, requests: queue.Queue[tuple[list[Sample], Future]]) -> None:
        self.requests = requests
        super().__init__((host, 0), _Handler)  # port 0: the system chooses a free one


class _Handler(BaseHTTPRequestHandler):
    """One request for each connection (HTTP/1.0), so that no idle connection holds up `close`."""

    server: _Server
    timeout = 60.0  # seconds for the next bytes of a request: a client may have gone without a word

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != ROUTE:
            return self._send(HTTPStatus.NOT_FOUND, f"no route {self.path}; POST {ROUTE}".encode())
        try:
            samples = decode_samples(content)
        except Exception as error:  # whatever was sent, it is no reason for the teacher to end
            return self._send(HTTPStatus.BAD_REQUEST, f"not the samples of a request: {error}".encode())
        future: Future = Future()
        self.server.requests.put((samples, future))
        failure = future.exception()
        if failure is None:
            self._send(HTTPStatus.OK, future.result())
        else:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(failure).__name__}: {failure}".encode())

    def _send(self, status: HTTPStatus, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for each step would bury what matters."""
