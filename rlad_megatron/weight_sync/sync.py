"""Gives the servers the trainer's weights, once per iteration."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from rlad_megatron.errors import WeightSyncError
from rlad_megatron.rollout.collective import is_first, on_first_rank
from rlad_megatron.weight_sync.shared_file import SharedFileTrainerEngine
from rlad_megatron.weight_sync.shared_memory import SharedMemoryTrainerEngine, shares_memory
from rlad_megatron.weight_sync.source import MegatronWeightSource

RESET_TRIES = 50
RESET_WAIT_S = 0.1


class ServerClient:
    """The weight routes of one server, over HTTP. It satisfies vLLM's `VLLMWeightSyncClient`.

    Every call has a timeout; every failure is a WeightSyncError that names the server and the route.
    """

    def __init__(self, index: int, url: str, timeout_s: float) -> None:
        self.name = f"server {index} ({url})"
        self._url = url
        self._timeout_s = timeout_s

    def pause(self) -> None:
        self._call("POST", "/pause", params={"mode": "wait"})

    def resume(self) -> None:
        self._call("POST", "/resume")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", json={"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("POST", "/update_weights", json={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("POST", "/finish_weight_update", json={"weight_version": weight_version})

    def reset_prefix_cache(self) -> None:
        """Forget keys and values of the old weights. vLLM refuses while a block is in use, so try for a while."""
        for _ in range(RESET_TRIES):
            if self._call("POST", "/reset_prefix_cache")["success"]:
                return
            time.sleep(RESET_WAIT_S)
        raise WeightSyncError(f"{self.name} kept its prefix cache for {RESET_TRIES * RESET_WAIT_S:g} s; restart it")

    def weight_version(self) -> str:
        return self._call("GET", "/weight_info")["weight_version"]

    def _call(
        self, method: str, route: str, *, params: dict[str, str] | None = None, json: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        try:
            # A connection for each call: a kept one may be one that the server has closed meanwhile.
            response = httpx.request(method, self._url + route, params=params, json=json, timeout=self._timeout_s)
        except httpx.TransportError as error:
            raise WeightSyncError(f"{self.name} did not answer {route}: {error!r}; see its log") from error
        if response.status_code != 200:
            raise WeightSyncError(f"{self.name} answered {response.status_code} on {route}: {response.text}")
        return response.json()


class WeightSync:
    """Pushes weights from all trainer ranks to the servers. A context manager: leaving it removes the file."""

    def __init__(
        self,
        source: MegatronWeightSource,
        urls: Sequence[str],
        *,
        run_dir: Path,
        timeout_s: float,
    ) -> None:
        """All ranks of the source's group together.

        urls: of the servers, by index; only rank 0 uses them. timeout_s: of each HTTP call.
        """
        self._group = source.group
        if shares_memory(urls, source.group):
            self._engine = SharedMemoryTrainerEngine(source=source, run_dir=run_dir, is_sender=is_first(source.group))
        else:
            self._engine = SharedFileTrainerEngine(source=source, run_dir=run_dir)
        self._clients: list[ServerClient] = []
        if is_first(source.group):
            self._clients = [ServerClient(index, url, timeout_s) for index, url in enumerate(urls)]

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def push(self, version: int, servers: Sequence[int] | None = None) -> None:
        """Give servers (default: all) the source's present weights as `version`. All ranks together.

        The weights are read only when `version` differs from that of the last push, so a server that was restarted
        gets exactly what the others have. Raises WeightSyncError, on every rank, naming the server; that
        server is then left paused, because its weights may be half old and half new.
        """
        if version != self._engine.version:
            self._engine.write(version)
        on_first_rank(lambda: self._update(version, servers), self._group)

    def close(self) -> None:
        """Remove the file."""
        self._engine.shutdown()

    def _update(self, version: int, servers: Sequence[int] | None) -> None:
        for client in self._clients if servers is None else [self._clients[index] for index in servers]:
            client.pause()
            self._engine.transmit(client)
            client.reset_prefix_cache()
            client.resume()
            held = client.weight_version()
            if held != str(version):
                raise WeightSyncError(f"{client.name} says it holds weights {held!r} after a push of {version}")
