"""A run of the demo that is as small as it gets, for tests through the command line; a server that several can use."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ports import free_port

from rlad_megatron.config import RolloutConfig
from rlad_megatron.secret import shared_token
from rlad_megatron.servers.process import own_server
from rlad_megatron.servers.transfer.choice import ON_CPUS

RLAD = [sys.executable, "-m", "rlad_megatron.cli"]
SMALL = [
    "kk_tiny_cpu",
    "train.steps=3",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "data.train_size=64",
    "data.eval_size=32",
    "student.layout.tensor_parallel=2",  # so that servers get the weights from shards
    "eval.every=0",
    "eval.teacher=false",
    "checkpoint.every=2",
]


@contextmanager
def external_server(folder: Path, student: str | Path) -> Iterator[list[str]]:
    """A server of this model; yields its address and the file with its secret, as overrides of a run.

    folder: for its log and the file.
    """
    token = folder / "token"
    shared_token(token)
    port = free_port()
    config = RolloutConfig(port=port, dtype="float32", kv_cache_gb=0.25, startup_timeout_s=500.0)
    server = own_server(
        config,
        0,
        model_path=str(student),
        max_model_len=256,
        run_dir=folder,
        seed=0,
        devices=None,
        transfer=ON_CPUS,
        token_file=token,
    )
    server.start()
    try:
        server.wait_ready()
        yield [f"rollout.urls=[{server.client.url}]", f"rollout.token_file={token}"]
    finally:
        server.stop()
