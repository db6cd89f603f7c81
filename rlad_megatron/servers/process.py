"""One rollout server: its client, and the process that runs it if it is our own."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rlad_megatron import platform
from rlad_megatron.config import RolloutConfig
from rlad_megatron.errors import ConfigError, RolloutError
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.secret import TOKEN_FILE, read_token
from rlad_megatron.servers.client import RECORDER, SAMPLE_ROUTE, ServerClient
from rlad_megatron.servers.sampling import PROBE_PROMPTS
from rlad_megatron.servers.transfer.choice import IPC, TransferChoice
from rlad_megatron.servers.vllm_plugin import FORK_ENGINE

HOST = "127.0.0.1"  # on one machine
PLUGIN = "rlad_megatron"  # the name of our entry points (servers/vllm_plugin.py)
POLL_S = 0.2
STOP_TIMEOUT_S = 30.0  # the supervisor needs at most about 5
LOG_LINES = 8  # of the log, in an error message
CPU_GDN_HEAD_DIM = 128
CPU_BLOCK_TOKENS = 32  # of vLLM's KV cache on CPUs: full blocks of a prompt are shared by its group
CPU_STEP_TOKENS = 2048  # vLLM's default on CPUs
MALLOC_KEEPS = 4 << 30  # bytes of freed memory that a server on CPUs uses again

# Set by the trainer's launcher. A server that inherits them would take itself for one of the trainer's ranks, and
# Megatron's CUDA_DEVICE_MAX_CONNECTIONS=1 would serialize vLLM's streams.
TRAINER_VARIABLES = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|CUDA_DEVICE_MAX_CONNECTIONS"
)


def check_ports(config: RolloutConfig) -> None:
    """Raise a ConfigError if the port of one of our servers is taken. No-op with `rollout.urls`."""
    if config.urls:
        return
    for index in range(config.servers):
        port = config.port + index
        try:
            socket.create_server((HOST, port)).close()
        except OSError as error:
            raise ConfigError(
                f"rollout.port={config.port}: port {port} on {HOST} for server {index} cannot be used "
                f"({os.strerror(error.errno or 0)}); choose another rollout.port or stop what listens there"
            ) from error


def check_kv_cache(config: RolloutConfig, max_model_len: int, bytes_per_token: int) -> None:
    """Raise a ConfigError if the KV cache of a server on CPUs is too small for one request. No-op on GPUs.

    If it is too small for all requests in flight, vLLM preempts some and computes them again. That is only slow.
    bytes_per_token: keys and values of one token in one worker.
    """
    if platform.has_cuda():
        return
    blocks = -(-max_model_len // CPU_BLOCK_TOKENS) + 1  # vLLM keeps one for itself
    size = blocks * CPU_BLOCK_TOKENS * bytes_per_token
    if int(config.kv_cache_gb * 2**30) < size:
        raise ConfigError(
            f"rollout.kv_cache_gb={config.kv_cache_gb:g}: a server's KV cache cannot hold the {max_model_len} tokens "
            f"of the longest prompt and response; use at least {math.ceil(size / 2**30 * 1e4) / 1e4:g}"
        )


def check_hybrid_servers(config: RolloutConfig, spec: ModelSpec, role: str) -> None:
    """Raise a ConfigError if vLLM's CPU build cannot serve the model's gated delta nets. No-op on GPUs."""
    if not spec.gdn_value_heads or platform.has_cuda():
        return
    if config.dtype != "bfloat16":
        raise ConfigError(
            f"rollout.dtype={config.dtype}: vLLM's CPU build runs gated delta nets in bf16 only; use bfloat16"
        )
    for what, size in (("key", spec.gdn_key_head_dim), ("value", spec.gdn_value_head_dim)):
        if size != CPU_GDN_HEAD_DIM:
            raise ConfigError(
                f"the {role}'s gated delta nets have {what} heads of {size}, and vLLM's CPU build takes "
                f"{CPU_GDN_HEAD_DIM} only; use another {role}.path"
            )


def check_router_replay(config: RolloutConfig) -> None:
    """Raise a ConfigError if rollout.router_replay is set, but the run's servers cannot return experts.

    Whether external servers do is known when they answer.
    """
    if config.router_replay and not config.urls and not platform.has_cuda():
        # Only vLLM's Model Runner V2 captures them, and it needs Triton (vllm/config/vllm.py).
        raise ConfigError(
            "rollout.router_replay=true, but vLLM's servers on CPUs do not return the experts that they chose; use "
            "rollout.router_replay=false, or servers on GPUs"
        )


def cpu_step_tokens(max_model_len: int, max_concurrency: int) -> int:
    """vLLM's max_num_batched_tokens, the most tokens of an engine step, for a server that does not split prefills.

    A prefill waits for a step that has room for all of it next to one token of each running request. The longest is
    the prompt and the response so far of a preempted request, at most `max_model_len`.
    """
    return max(CPU_STEP_TOKENS, max_model_len + max_concurrency)


def server_environment(workers: int, devices: str | None, transfer: TransferChoice) -> dict[str, str]:
    """The environment of a server on this host: ours, without the trainer's variables, plus vLLM's switches.

    workers: of all servers on this host, which share its cores. devices: value of CUDA_VISIBLE_DEVICES; None: ours.
    """
    environment = {name: value for name, value in os.environ.items() if not TRAINER_VARIABLES.fullmatch(name)}
    if environment.get(platform.ALLOCATOR_VARIABLES[0]) == platform.EXPANDABLE_SEGMENTS:
        del environment[platform.ALLOCATOR_VARIABLES[0]]  # the ranks', and servers that sleep refuse it
    environment |= {
        "VLLM_SERVER_DEV_MODE": "1",  # the weight update routes
        "VLLM_PLUGINS": PLUGIN,
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",  # the log must be complete when the server dies
    }
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    if transfer.backend == IPC:
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # memory handles come pickled
    if not platform.has_cuda():
        environment[FORK_ENGINE] = "1"
        # Lets the model run inside the engine's process (see own_server).
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Even an eager vLLM compiles functions of its sampler, again for each batch size: 10 s for what takes no time.
        environment["TORCH_COMPILE_DISABLE"] = "1"
        # vLLM binds the workers of each server to the same cores, and dies if there are more of them than NUMA nodes.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # One core is left to the API servers, as vLLM itself does.
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = str(max(1, (cores - 1) // workers))
        # Ranks and rewards use these cores too, and a thread that spins may keep a core from the one it waits for.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # A push allocates and frees as much as the weights. glibc would give that back to the kernel each time.
        environment |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(MALLOC_KEEPS))
    return environment


@dataclass(frozen=True)
class Launch:
    """How a server is started on this host."""

    command: list[str]
    environment: dict[str, str]
    log_path: Path


class VllmServer:
    """One server: a child of this process (`own_server`), or an external one (`rollout.urls`).

    An external one can only be waited for: start, stop and restart leave it alone.
    """

    def __init__(
        self, config: RolloutConfig, index: int, url: str, launch: Launch | None = None, token: str = ""
    ) -> None:
        """launch: None if the server is external. token: its secret; empty: it asks for none."""
        self.config = config
        self.client = ServerClient(index, url, config.request_timeout_s, token)
        self.index, self.name = index, self.client.name
        self.launch = launch
        self.restarts = 0
        self._supervisor: subprocess.Popen | None = None
        self._log_start = 0  # byte of the log at which the present start begins

    def start(self) -> None:
        """Start without waiting; `wait_ready` waits."""
        if self.launch is None:
            return
        self.launch.log_path.parent.mkdir(parents=True, exist_ok=True)
        supervise = [sys.executable, "-m", "rlad_megatron.servers.supervisor", str(os.getpid())]
        with self.launch.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._supervisor = subprocess.Popen(
                supervise + self.launch.command,
                env=self.launch.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the trainer's to handle
            )

    def alive(self) -> bool:
        """Whether our process runs, which may still be starting; whether an external server answers."""
        if self.launch is None:
            return self.client.healthy()
        return self._supervisor is not None and self._supervisor.poll() is None

    def wait_ready(self) -> None:
        """Wait until the server answers.

        Raises RolloutError, with the log's last lines, when it ends or exceeds rollout.startup_timeout_s.
        """
        timeout_s = self.config.startup_timeout_s
        deadline = time.monotonic() + timeout_s
        while not self.client.healthy():
            if self._supervisor is not None and self._supervisor.poll() is not None:
                code = self._supervisor.returncode
                raise RolloutError(f"{self.name} ended with exit code {code} before it answered; {self.log_tail()}")
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"{self.name} did not answer within rollout.startup_timeout_s={timeout_s:g}; raise it or see why: "
                    f"{self.log_tail()}"
                )
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End the server and all its processes. Safe to call twice."""
        if self._supervisor is None:
            return
        self._supervisor.terminate()
        try:
            self._supervisor.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise RolloutError(
                f"{self.name} did not end within {STOP_TIMEOUT_S:g} s of SIGKILL; see what holds process group "
                f"{self._supervisor.pid}, {self.log_tail()}"
            ) from error
        self._supervisor = None

    def restart(self, why: str) -> None:
        """Stop and start, without waiting for an answer. RolloutError after rollout.max_restarts of them."""
        if self.restarts >= self.config.max_restarts:
            raise RolloutError(
                f"{self.name} died again after {self.restarts} restarts (rollout.max_restarts="
                f"{self.config.max_restarts}): {why}; {self.log_tail()}"
            )
        self.restarts += 1
        print(f"{self.name} is restarted ({self.restarts}): {why}", file=sys.stderr)
        self.stop()
        self.start()

    def log_tail(self) -> str:
        """Where the log is and its last lines since the present start, in one line."""
        if self.launch is None:
            return "its log is where it was started"
        with self.launch.log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        return f"log {self.launch.log_path}: " + " | ".join([line for line in lines if line][-LOG_LINES:])


def own_server(
    config: RolloutConfig,
    index: int,
    *,
    model_path: str,
    max_model_len: int,
    run_dir: Path,
    seed: int,
    devices: str | None,
    transfer: TransferChoice,
    token_file: Path,
    returns_experts: bool = False,
    host: str = HOST,
    port: int | None = None,
) -> VllmServer:
    """A server that runs as a child of this process, under `servers/supervisor.py`. It is not started yet.

    max_model_len: prompt and response tokens together. devices: its CUDA_VISIBLE_DEVICES. token_file: with the
    secret that it asks for. returns_experts: it can send the experts that it chose. host, port: address to listen on;
    by default the loopback, and the configuration's port + index.
    """
    port = config.port + index if port is None else port
    # The `vllm` console script needs a distribution of that name, which CPU builds are not.
    command = [sys.executable, "-m", "rlad_megatron.servers.api_server", "--disable-uvicorn-access-log"]
    command += ["--model", model_path, "--host", host, "--port", str(port), "--seed", str(seed)]
    command += ["--dtype", config.dtype, "--max-model-len", str(max_model_len)]
    # The probe need not wait for responses of a later round that are in flight.
    most_requests = config.max_concurrency + PROBE_PROMPTS
    command += ["--tensor-parallel-size", str(config.tensor_parallel), "--max-num-seqs", str(most_requests)]
    # Token ids in, token ids out: only the trainer's tokenizer makes text.
    command += ["--skip-tokenizer-init"]
    # Log-probs of logits / temperature. vLLM's default is those of the raw logits.
    command += ["--logprobs-mode", "processed_logprobs"]
    # Not the checkpoint's generation_config.json: its top-k and top-p would become silent defaults.
    command += ["--generation-config", "vllm"]
    command += ["--weight-transfer-config", f'{{"backend": "{transfer.backend}"}}']
    command += ["--worker-extension-cls", RECORDER, "--middleware", SAMPLE_ROUTE]
    if transfer.sleep_level:
        command += ["--enable-sleep-mode"]
    if returns_experts:
        command += ["--enable-return-routed-experts"]
    if platform.has_cuda():
        command += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    else:
        # In bytes, because VLLM_CPU_KVCACHE_SPACE takes only whole GiB.
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(int(config.kv_cache_gb * 2**30))]
        # vLLM's engine on CPUs dies when it splits the prefill of a seeded request: it samples after each part, drops
        # the sample and rewinds the request's generator (GPUModelRunner._bookkeeping_sync), which torch cannot on CPUs.
        command += ["--no-enable-chunked-prefill", "--block-size", str(CPU_BLOCK_TOKENS)]
        command += ["--max-num-batched-tokens", str(cpu_step_tokens(max_model_len, most_requests))]
        if (Path(model_path) / "config.json").is_file() and read_model_spec(model_path).gdn_value_heads:
            # With prefixes cached, the states of gated delta nets need chunked prefill.
            command += ["--no-enable-prefix-caching"]
        if config.tensor_parallel == 1:
            # One process less, and no messages to it.
            command += ["--distributed-executor-backend", "uni"]
    environment = server_environment(config.servers * config.tensor_parallel, devices, transfer)
    environment |= {TOKEN_FILE: str(token_file)}
    if host.startswith("127."):
        environment |= platform.ON_LOOPBACK
    launch = Launch(command, environment, run_dir / "logs" / f"vllm_{index}.log")
    return VllmServer(config, index, f"http://{host}:{port}", launch, read_token(token_file))
