"""What the trainer asks of a server beside rollouts, over HTTP."""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from rlad_megatron.errors import WeightSyncError

RESET_TRIES = 50
RESET_WAIT_S = 0.1


class ServerClient:
    """The weight and sleep routes of one server. It satisfies vLLM's `VLLMWeightSyncClient`.

    Every call has a timeout; every failure is a WeightSyncError that names the server and the route.
    """

    def __init__(self, index: int, url: str, timeout_s: float) -> None:
        self.index = index
        self.url = url
        self.name = f"server {index} ({url})"
        self.timeout_s = timeout_s

    def pause(self) -> None:
        self._call("POST", "/pause", params={"mode": "wait"})

    def resume(self) -> None:
        self._call("POST", "/resume")

    def sleep(self, level: int) -> None:
        """Give the GPU's memory back. Level 1 keeps a copy of the weights on the host, level 2 keeps nothing.

        Requests in flight are aborted; there are none between rollouts.
        """
        self._call("POST", "/sleep", params={"level": level})

    def wake_up(self, what: str) -> None:
        """Take memory for "weights" or "kv_cache" again. With the last of them the server takes requests again.

        Nothing happens to what is awake.
        """
        self._call("POST", "/wake_up", params={"tags": what})

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", json={"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self._call("POST", "/shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("POST", "/update_weights", json={"update_info": json_ready(update_info)})

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
        """What it was given last; `UNPUSHED` if nothing since its start."""
        return self._call("GET", "/weight_info")["weight_version"]

    def workers(self) -> int:
        """Processes with a part or a copy of the model."""
        return self._call("GET", "/get_world_size")["world_size"]

    def _call(
        self,
        method: str,
        route: str,
        *,
        params: dict[str, str | int] | None = None,
        json: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        try:
            # A connection for each call: a kept one may be one that the server has closed meanwhile.
            response = httpx.request(method, self.url + route, params=params, json=json, timeout=self.timeout_s)
        except httpx.TransportError as error:
            raise WeightSyncError(f"{self.name} did not answer {route}: {error!r}; see its log") from error
        if response.status_code != 200:
            raise WeightSyncError(f"{self.name} answered {response.status_code} on {route}: {response.text}")
        return response.json()


def json_ready(update_info: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON can hold it: handles of GPU memory are pickled, as `IPCWeightTransferUpdateInfo` takes them."""
    handles = update_info.get("ipc_handles")
    if handles is None:
        return update_info
    pickled = base64.b64encode(pickle.dumps(handles)).decode()
    return {**update_info, "ipc_handles": None, "ipc_handles_pickled": pickled}


def for_each_server(action: Callable[[ServerClient], None], clients: Sequence[ServerClient]) -> None:
    """Call `action` for all servers at the same time and wait for all; raises the first one's error."""
    with ThreadPoolExecutor(max_workers=max(1, len(clients))) as pool:
        for result in [pool.submit(action, client) for client in clients]:
            result.result()
