"""The HTTP client of a rollout server. Every call to one goes through here, and every failure gets its name here."""

from __future__ import annotations

import base64
import math
import pickle
import resource
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import httpx

from rlad_megatron.errors import RolloutError, WeightSyncError
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.secret import headers
from rlad_megatron.servers.frames import SAMPLE, SHOWN, Completion, FrameError, NoFrameError, decode_frames

UNPUSHED = "default"  # vLLM's name for the weights that a server loaded itself at start-up
RECORDER = "rlad_megatron.servers.transfer.worker.FingerprintRecorder"
SAMPLE_ROUTE = "rlad_megatron.servers.sampler.SampleRoute"
CALL_WORKERS = "/collective_rpc"
HEALTH_TIMEOUT_S = 5.0
# No proxy of the environment, which cannot reach a server of the run. And no certificates, which httpx would load for
# each client, in 30 ms: addresses are http:// only.
DIRECT: Any = {"trust_env": False, "verify": False}
FINISH_REASONS = ("stop", "length")
LARGEST_LOG_PROB = 1e-3  # of rounding
RESET_TRIES = 50
RESET_WAIT_S = 0.1

T = TypeVar("T")
R = TypeVar("R")


class ServerDownError(RolloutError):
    """No connection, a connection cut off, or a 5xx answer, which vLLM gives once its engine has died."""


class ServerTimeoutError(RolloutError):
    """The server is connected but did not answer in time."""


class ServerClient:
    """What can be asked of one server: control of weights and memory, and sampling.

    Every call has a timeout. A failure is a ServerDownError, a ServerTimeoutError, or a RolloutError for a refusal. It
    names the server and the route. The class satisfies vLLM's `VLLMWeightSyncClient`.
    """

    def __init__(self, index: int, url: str, timeout_s: float, token: str = "") -> None:
        """token: the server's secret; empty: it asks for none."""
        self.index = index
        self.url = url.rstrip("/")
        self.name = f"server {index} ({self.url})"
        self.timeout_s = timeout_s
        self.vocab_size: int | None = None  # of its model, if that is known
        self.replay: ModelSpec | None = None  # its model, if its choice of experts is replayed
        self._headers = headers(token)

    def healthy(self) -> bool:
        """Whether the server and its engine answer. Raises RolloutError if it refuses to, as without its secret."""
        try:
            self._request("GET", "/health", HEALTH_TIMEOUT_S)
        except (ServerDownError, ServerTimeoutError):
            return False
        return True

    async def sample(
        self, session: httpx.AsyncClient, body: dict[str, Any]
    ) -> AsyncGenerator[tuple[int, Completion], None]:
        """Sample one prompt's group: yields (member, Completion) as members end.

        Closing the generator aborts the members that are left. session: from `open_session`. body: of `sampling_body`.
        """
        missing = set(range(len(body["seeds"])))
        with self._named_errors(SAMPLE):
            async with session.stream("POST", self.url + SAMPLE, json=body, headers=self._headers) as response:
                if response.is_error:
                    await response.aread()  # the text of the error
                response.raise_for_status()
                async for member, completion in decode_frames(response.aiter_raw()):
                    wrong = what_is_wrong(completion, body["params"]["max_tokens"], self.vocab_size)
                    if not wrong and self.replay is not None and body["experts"]:
                        wrong = _wrong_experts(completion, len(body["prompt"]), self.replay)
                    if wrong:
                        raise RolloutError(
                            f"{self.name} answered {SAMPLE} for a prompt of {len(body['prompt'])} tokens with {wrong} "
                            f"(member {member} of {len(body['seeds'])})"
                        )
                    if member not in missing:
                        raise RolloutError(
                            f"{self.name} answered {SAMPLE} with member {member}, which is not asked for"
                        )
                    missing.remove(member)
                    yield member, completion
                if missing:
                    raise FrameError(f"members {sorted(missing)} are missing")

    def pause(self) -> None:
        """Stop decoding. Requests in flight wait until `resume`."""
        self._call("POST", "/pause", params={"mode": "keep"})

    def resume(self) -> None:
        self._call("POST", "/resume")

    def paused(self) -> bool:
        return self._ask("is_paused", bool, "GET", "/is_paused")

    def sleep(self, level: int) -> None:
        """Free the server's GPU memory. Level 1 keeps the weights on the host, level 2 keeps nothing.

        Aborts requests in flight; there are none between rollouts.
        """
        self._call("POST", "/sleep", params={"level": level})

    def wake_up(self, what: str) -> None:
        """Allocate memory for "weights" or "kv_cache" again. No-op for what is awake.

        The server takes requests once both are awake.
        """
        self._call("POST", "/wake_up", params={"tags": what})

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", json={"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if update_info.get("ipc_handles") is not None:  # pickled, as `IPCWeightTransferUpdateInfo` takes them in JSON
            pickled = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
            update_info = update_info | {"ipc_handles": None, "ipc_handles_pickled": pickled}
        self._call("POST", "/update_weights", json={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("POST", "/finish_weight_update", json={"weight_version": weight_version})

    def reset_prefix_cache(self) -> None:
        """Drop keys and values of the old weights. Those of requests in flight are computed again.

        vLLM refuses while a block is in use, so this tries repeatedly.
        """
        for _ in range(RESET_TRIES):
            if self._ask("success", bool, "POST", "/reset_prefix_cache", params={"reset_running_requests": True}):
                return
            time.sleep(RESET_WAIT_S)
        raise WeightSyncError(f"{self.name} kept its prefix cache for {RESET_TRIES * RESET_WAIT_S:g} s; restart it")

    def weight_version(self) -> str:
        """The version pushed last; `UNPUSHED` if none was pushed since the server's start."""
        return self._ask("weight_version", str, "GET", "/weight_info")

    def call_workers(self, method: str) -> list[Any]:
        """Call a method of every worker (RECORDER); returns each one's result."""
        return self._ask("results", list, "POST", CALL_WORKERS, json={"method": method})

    def workers(self) -> int:
        """Number of processes that hold a part or a copy of the model."""
        return self._ask("world_size", int, "GET", "/get_world_size")

    def _call(self, method: str, route: str, **content: Any) -> None:
        self._request(method, route, self.timeout_s, **content)

    def _ask(self, field: str, kind: type[T], method: str, route: str, **content: Any) -> T:
        """A field of the answer, of this type."""
        response = self._request(method, route, self.timeout_s, **content)
        try:
            if isinstance(value := response.json()[field], kind):
                return value
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        text = " ".join(response.text.split())
        raise RolloutError(
            f"{self.name} answered {route} without {field!r} ({kind.__name__}): {text:.{SHOWN}}; is it a vLLM server?"
        )

    def _request(self, method: str, route: str, timeout_s: float, **content: Any) -> httpx.Response:
        with self._named_errors(route):
            # One connection per call: the server may have closed one that was kept.
            response = httpx.request(
                method, self.url + route, timeout=timeout_s, headers=self._headers, **DIRECT, **content
            )
            return response.raise_for_status()

    @contextmanager
    def _named_errors(self, route: str) -> Iterator[None]:
        try:
            yield
        except httpx.ReadTimeout as error:
            limit = f"rollout.request_timeout_s={self.timeout_s:g}"
            remedy = "raise it, or lower rollout.max_concurrency" if route == SAMPLE else "raise it"
            raise ServerTimeoutError(f"{self.name} did not answer {route} within {limit}; {remedy}") from error
        except NoFrameError as error:
            text = " ".join(str(error).split())
            raise RolloutError(f"{self.name} answered {route} with something else: {text}; see its log") from error
        except FrameError as error:
            raise ServerDownError(f"{self.name} broke off {route}: {error}; see its log") from error
        except httpx.TransportError as error:
            raise ServerDownError(f"{self.name} did not answer {route}: {error!r}; see its log") from error
        except httpx.HTTPStatusError as error:
            code, text = error.response.status_code, " ".join(error.response.text.split())
            said = f"{self.name} answered {code} on {route}: {text:.{SHOWN}}"
            if route == CALL_WORKERS:
                said += f"; an external server needs --worker-extension-cls {RECORDER}"
            if code >= 500:
                raise ServerDownError(said) from error
            if code == 401:
                said += "; give the file with its secret as rollout.token_file"
            if route == SAMPLE and code == 404:
                said += f"; an external server needs --middleware {SAMPLE_ROUTE}"
            elif code == 404:
                said += "; start it with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config"
            raise RolloutError(said) from error


def what_is_wrong(completion: Completion, longest: int, vocab_size: int | None) -> str | None:
    """What a server must not have answered, in words; None if nothing is.

    longest: tokens that were asked for. vocab_size: of the model; None if it is not known.
    """
    tokens, log_probs, versions = completion.tokens, completion.log_probs, completion.versions
    counts = len(log_probs), sum(count for _, count in versions)
    if counts != (len(tokens),) * 2:
        return f"{len(tokens)} tokens, {counts[0]} log-probs and {counts[1]} weight versions"
    if not 0 < len(tokens) <= longest:
        return f"{len(tokens)} tokens, where 1 to {longest} were asked for"
    if completion.finish_reason not in FINISH_REASONS:
        return f"finish_reason {completion.finish_reason!r:.50}, which is none of {', '.join(FINISH_REASONS)}"
    if min(tokens) < 0 or (vocab_size is not None and max(tokens) >= vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < (vocab_size or math.inf))
        return f"token {wrong}, which is not in the model's vocabulary of {vocab_size}"
    if not math.isfinite(sum(log_probs)) or max(log_probs) > LARGEST_LOG_PROB:
        place = next(i for i, value in enumerate(log_probs) if not -math.inf < value <= LARGEST_LOG_PROB)
        return f"log-prob {log_probs[place]} at token {place}; it must be finite and at most 0"
    for label, _ in versions:
        if label != UNPUSHED and not label.removeprefix("-").isdecimal():
            return f"weight version {label!r:.50}, which this run has not pushed"
    return None


def _wrong_experts(completion: Completion, prompt_length: int, model: ModelSpec) -> str | None:
    """As `what_is_wrong`, of a completion that must have the experts that the model chose."""
    experts = completion.experts
    if experts is None:
        return (
            "no experts, for which rollout.router_replay=true asks; if it is one of rollout.urls, it needs this "
            f"version of {SAMPLE_ROUTE}"
        )
    shape = prompt_length + len(completion.tokens) - 1, model.num_layers, model.experts_per_token
    if experts.shape != shape:
        return f"experts of shape {experts.shape}, where {shape} (tokens, layers, experts of a token) was asked for"
    if experts.max() >= model.num_experts:
        return f"expert {experts.max()}, which is not one of the model's {model.num_experts}"
    return None


def raise_file_limit() -> None:
    """Let this process open as many files as it may: a connection for each group in flight, and for each server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # not everywhere allowed, and `open_session` keeps to what there is
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_session(timeout_s: float) -> httpx.AsyncClient:
    """Connections for many groups at the same time; others wait for one.

    At most for half of the files that the process may open: one more than all would look like a dead server.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = None if files == resource.RLIM_INFINITY else max(1, files // 2)
    # vLLM drops idle connections after 5 s. We drop them first: a closed one would look like a dead server.
    limits = httpx.Limits(max_connections=most, keepalive_expiry=1.0)
    return httpx.AsyncClient(timeout=httpx.Timeout(timeout_s, pool=None), limits=limits, **DIRECT)


def for_each_server(action: Callable[[T], R], servers: Sequence[T]) -> list[R]:
    """Call `action` for all servers at the same time and wait for all; raises the first one's error."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        return list(pool.map(action, servers))
