"""One vLLM server: start, health, stop, restart.

`VllmServer` is a child of this process. `ExternalServer` is one that somebody else started and restarts.
Both answer to the same calls.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import torch

from rlad_megatron.config import RolloutConfig
from rlad_megatron.errors import ConfigError, RolloutError
from rlad_megatron.servers.transfer.choice import IPC, ON_CPUS, Transfer

HOST = "127.0.0.1"  # of a run on one machine: the development routes can load any weights
PLUGIN = "rlad_megatron"  # that entry point's name
POLL_S = 0.2
STOP_TIMEOUT_S = 30.0  # the supervisor needs about 5 at most
LOG_LINES = 8  # of the log, in an error message

# Of the trainer's launcher. A server that inherits them would believe that it is one of the trainer's ranks.
TRAINER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    "CUDA_DEVICE_MAX_CONNECTIONS",  # Megatron's 1 would put vLLM's streams behind each other
)
TRAINER_PREFIX = "TORCHELASTIC_"


def check_ports(config: RolloutConfig) -> None:
    """Raise a ConfigError if a port of an own server is taken. Nothing to check where `urls` are given."""
    if config.urls:
        return
    for index in range(config.servers):
        port = config.port + index
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise ConfigError(
                    f"rollout.port={config.port}: port {port} on {HOST} for server {index} cannot be used "
                    f"({error.strerror}); choose another rollout.port or stop what listens there"
                ) from error


def server_environment(servers: int, devices: str | None, transfer: Transfer = ON_CPUS) -> dict[str, str]:
    """The environment of a server on this host: ours, without what belongs to the trainer, plus vLLM's switches.

    servers: how many share this host's cores. devices: value of CUDA_VISIBLE_DEVICES, None to inherit it.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in TRAINER_VARIABLES and not name.startswith(TRAINER_PREFIX)
    }
    environment |= {
        "VLLM_SERVER_DEV_MODE": "1",  # the weight update routes
        "VLLM_PLUGINS": PLUGIN,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",  # the log must be complete when the server dies
    }
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    if transfer.backend == IPC:
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # memory handles come pickled
    if not torch.cuda.is_available():
        # Lets the model run inside the engine's process; else a third process imports vLLM (see server_command).
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # vLLM binds threads to cores only in that third process, so their number is set here.
        # One core is left to the API servers, as vLLM itself does.
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = str(max(1, (cores - 1) // servers))
    return environment


def server_command(
    config: RolloutConfig,
    *,
    model_path: str,
    max_model_len: int,
    host: str,
    port: int,
    seed: int,
    transfer: Transfer = ON_CPUS,
) -> list[str]:
    """vLLM's command line. Each flag that is not plain says why."""
    # The `vllm` console script needs a distribution of that name, which CPU builds are not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model_path, "--host", host, "--port", str(port), "--seed", str(seed)]
    command += ["--dtype", config.dtype, "--max-model-len", str(max_model_len)]
    command += ["--tensor-parallel-size", str(config.tensor_parallel), "--max-num-seqs", str(config.max_concurrency)]
    # Token ids in, token ids out: text is made by the trainer's tokenizer alone.
    command += ["--skip-tokenizer-init"]
    # Log-probs of logits / temperature. vLLM's default are those of the raw logits.
    command += ["--logprobs-mode", "processed_logprobs"]
    # Not the checkpoint's generation_config.json: its top-k and top-p would become silent defaults.
    command += ["--generation-config", "vllm"]
    command += ["--weight-transfer-config", f'{{"backend": "{transfer.backend}"}}']
    if transfer.sleep_level:
        command += ["--enable-sleep-mode"]
    command += ["--disable-uvicorn-access-log"]
    if torch.cuda.is_available():
        command += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    else:
        # In bytes, because VLLM_CPU_KVCACHE_SPACE takes whole GiB only.
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(int(config.kv_cache_gb * 2**30))]
        if config.tensor_parallel == 1:
            # Halves the start-up time: one process less that imports vLLM.
            command += ["--distributed-executor-backend", "uni"]
    return command


class VllmServer:
    """A server of our own: `python -m rlad_megatron.servers.supervisor` with vLLM below it."""

    def __init__(
        self,
        config: RolloutConfig,
        index: int,
        *,
        model_path: str,
        max_model_len: int,
        run_dir: Path,
        seed: int = 0,
        devices: str | None = None,
        transfer: Transfer = ON_CPUS,
        host: str = HOST,
        port: int | None = None,
    ) -> None:
        """max_model_len: prompt and response tokens together. devices: its CUDA_VISIBLE_DEVICES.

        host, port: address to listen on; the default is the loopback, and the configuration's port + index.
        """
        port = config.port + index if port is None else port
        self.index = index
        self.url = f"http://{host}:{port}"
        self.log_path = Path(run_dir) / "logs" / f"vllm_{index}.log"
        self.name = f"server {index} ({self.url})"
        self._timeout_s = config.startup_timeout_s
        self._environment = server_environment(config.servers, devices, transfer)
        self._command = server_command(
            config,
            model_path=model_path,
            max_model_len=max_model_len,
            host=host,
            port=port,
            seed=seed,
            transfer=transfer,
        )
        self._supervisor: subprocess.Popen | None = None
        self._log_start = 0  # byte of the log at which the present start begins

    def start(self) -> None:
        """Start without waiting; `wait_ready` waits."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        supervise = [sys.executable, "-m", "rlad_megatron.servers.supervisor", str(os.getpid())]
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._supervisor = subprocess.Popen(
                supervise + self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the trainer's to handle
            )

    def alive(self) -> bool:
        """Whether the process runs; it may still be starting."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def wait_ready(self) -> None:
        """Wait until it answers. RolloutError, with the log's last lines, when it ends or takes too long."""
        deadline = time.monotonic() + self._timeout_s
        while not healthy(self.url):
            if not self.alive():
                code = self._supervisor.returncode if self._supervisor else "none"
                raise RolloutError(f"{self.name} ended with exit code {code} before it answered; {self.log_tail()}")
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"{self.name} did not answer within rollout.startup_timeout_s={self._timeout_s:g}; raise it or "
                    f"see why: {self.log_tail()}"
                )
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End it and all its processes. Safe to call twice."""
        if self._supervisor is not None:
            if self._supervisor.poll() is None:
                self._supervisor.terminate()
            try:
                self._supervisor.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                raise RolloutError(
                    f"{self.name} did not end within {STOP_TIMEOUT_S:g} s of SIGKILL; see what holds process group "
                    f"{self._supervisor.pid}, {self.log_tail()}"
                ) from error
            self._supervisor = None

    def restart(self) -> None:
        """Stop and start, without waiting for the new one to answer."""
        self.stop()
        self.start()

    def log_tail(self) -> str:
        """Where the log is and what it said last since the present start, in one line."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        return f"log {self.log_path}: " + " | ".join([line for line in lines if line][-LOG_LINES:])


class ExternalServer:
    """A server that somebody else started (`rollout.urls`): it can only be waited for."""

    def __init__(self, config: RolloutConfig, index: int) -> None:
        self.index = index
        self.url = config.urls[index].rstrip("/")
        self.name = f"server {index} ({self.url})"
        self._timeout_s = config.startup_timeout_s

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def restart(self) -> None:
        pass

    def alive(self) -> bool:
        return healthy(self.url)

    def wait_ready(self) -> None:
        """Wait until it answers; RolloutError after rollout.startup_timeout_s."""
        deadline = time.monotonic() + self._timeout_s
        while not healthy(self.url):
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"{self.name} of rollout.urls did not answer within rollout.startup_timeout_s="
                    f"{self._timeout_s:g}; start it again with VLLM_SERVER_DEV_MODE=1"
                )
            time.sleep(POLL_S)

    def log_tail(self) -> str:
        return "its log is where it was started"


def healthy(url: str) -> bool:
    """Whether a server answers its health route, engine included."""
    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False
