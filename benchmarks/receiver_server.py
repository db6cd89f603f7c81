"""A rollout server without vLLM: the routes of a weight update, and workers that run the real receiving code.

For tests and benchmarks, in which vLLM's own loading is not the question:

    python benchmarks/receiver_server.py HOST [WORKERS]

prints the server's URL, and serves until it is killed. Workers are threads of one process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from rlad_megatron.models.fingerprint import fingerprint
from rlad_megatron.servers.client import UNPUSHED
from rlad_megatron.servers.transfer.membership import error_of
from rlad_megatron.servers.transfer.receiver import Invitation, Receiver


class Workers:
    """The workers of one server, with vLLM's rules: an update is begun once, and finished."""

    def __init__(self, count: int, keep: bool) -> None:
        """keep: fingerprints of what arrives; without them a push costs only the transfer."""
        self.version, self.count, self._keep = UNPUSHED, count, keep
        self.held: list[dict[str, int]] = [{} for _ in range(count)]
        self.dies_after: int | None = None  # tensors of the next push
        self.fails_after: int | None = None
        self.refuses_to_join = False  # the first worker
        self.errors = [""] * count  # of the last call
        self._updating = False
        self._receivers: list[Receiver | None] = [None] * count
        self._lock = threading.Lock()

    def init(self, told: Invitation) -> None:
        self._on_all(lambda worker: self._join(worker, told))

    def start(self) -> None:
        if self._updating:
            raise RuntimeError("start_weight_update called while a weight update is already active")
        self._updating = True

    def finish(self, version: str) -> None:
        if not self._updating or any(self.errors):
            raise RuntimeError("there is no update to finish")
        self.version, self._updating = version, False

    def call(self, method: str) -> list:
        """As vLLM's collective_rpc, with what worker.py adds to workers."""
        if method == "leave_transfer":
            self._leave()
        return self.errors if method == "transfer_error" else [""] * self.count

    def _leave(self) -> None:
        self._updating = False
        for worker, receiver in enumerate(self._receivers):
            if receiver is not None:
                receiver.close()
            self._receivers[worker] = None

    def update(self) -> None:
        self._on_all(self._receive)

    def _join(self, worker: int, told: Invitation) -> None:
        receiver = Receiver(told, worker, torch.device("cpu"))
        if self.refuses_to_join and worker == 0:
            receiver.close()
            raise ValueError("another model")
        self._receivers[worker] = receiver

    def _receive(self, worker: int) -> None:
        receiver = self._receivers[worker]
        assert receiver is not None
        held: dict[str, int] = {}

        def load(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
            for count, (name, tensor) in enumerate(tensors):
                if count == self.dies_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                if count == self.fails_after:
                    raise ValueError("cannot load")
                held[name] = fingerprint(tensor).item() if self._keep else 0

        receiver.receive(load)
        self.held[worker] = held

    def _on_all(self, action: Callable[[int], None]) -> None:
        def attempt(worker: int) -> str:
            return error_of(f"worker {worker}", lambda: action(worker))

        with ThreadPoolExecutor(self.count) as pool:
            self.errors = list(pool.map(attempt, range(self.count)))


def serve(host: str, workers: int, ready: Callable[[str], None], *, keep: bool = True) -> None:
    """Answer until the process is killed. ready: called with the URL."""
    torch.set_num_threads(1)
    state = Workers(workers, keep)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown = {"world_size": state.count, "weight_version": state.version}
            self._answer(lambda body: shown | {"held": state.held, "errors": state.errors})

        def do_POST(self) -> None:
            def act(body: dict) -> dict:
                route = self.path.split("?")[0]
                if route == "/init_weight_transfer_engine":
                    state.init(Invitation(**body["init_info"]))
                elif route == "/start_weight_update":
                    state.start()
                elif route == "/update_weights":
                    state.update()
                elif route == "/finish_weight_update":
                    state.finish(body["weight_version"])
                elif route == "/collective_rpc":
                    return {"results": state.call(body["method"])}
                elif route == "/misbehave":
                    state.dies_after, state.fails_after = body.get("dies_after"), body.get("fails_after")
                    state.refuses_to_join = body.get("refuses_to_join", False)
                return {"success": True}

            self._answer(act)

        def _answer(self, act: Callable[[dict], dict]) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(content) if content and self.path != "/sink" else {}
            try:
                code, content = 200, act(body)
            except Exception as error:
                code, content = 500, {"error": f"{type(error).__name__}: {error}"}
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer((host, 0), Handler) as server:
        ready(f"http://{host}:{server.server_address[1]}")
        server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), lambda url: print(url, flush=True), keep=False)
