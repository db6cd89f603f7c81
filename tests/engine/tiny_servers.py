"""What the engine tests share: tiny random Qwen3 checkpoints, a hand-made shard plan, and running servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from ports import free_port
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlad_megatron.config import RolloutConfig, RunConfig
from rlad_megatron.models.box import Box
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.models.shard_plan import Piece, ShardEntry
from rlad_megatron.servers.client import Completion
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.process import VllmServer
from rlad_megatron.servers.sampling import decode_greedily

VOCAB = 200
EOS = 7
MAX_MODEL_LEN = 256
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]


def rollout_config(**changes: object) -> RolloutConfig:
    # Few requests at a time make a batch last long enough to be disturbed.
    config = RolloutConfig(
        port=free_port(),
        dtype="float32",
        max_concurrency=4,
        kv_cache_gb=0.1,
        startup_timeout_s=500.0,
        request_timeout_s=300.0,
    )
    return replace(config, **changes)


def write_checkpoint(folder: Path, *, seed: int, tied: bool, positions: int = MAX_MODEL_LEN) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return folder


def hf_log_probs(folder: Path, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """float32 [R]: what transformers says of the response."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return log_probs.gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)


def half_weights(folder: Path, rank: int, ranks: int, group: object = None) -> GatheredWeights:
    """Weights over a hand-made plan: each rank holds a band of rows, vectors are all on rank 0."""
    weights = load_file(folder / "model.safetensors")
    entries, parameters = [], {}
    for name, tensor in weights.items():
        rows = tensor.shape[0]
        start, stop = (rank * rows // ranks, (rank + 1) * rows // ranks) if tensor.dim() == 2 else (0, rows)
        others = tuple((0, size) for size in tensor.shape[1:])
        piece = Piece(name, Box(((start, stop), *others)), Box(((0, stop - start), *others)))
        local = tensor[start:stop].clone()
        entries.append(ShardEntry(f"local.{name}", tuple(local.shape), (piece,), tensor.dim() == 2 or rank == 0))
        parameters[f"local.{name}"] = local
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return GatheredWeights(entries, parameters, shapes, dtype=torch.float32, is_writer=True, group=group)


def kill_api_server(server: VllmServer) -> None:
    """SIGKILL vLLM's first process, as the kernel does when memory runs out."""
    supervisor = psutil.Process(server._supervisor.pid)
    supervisor.children()[0].kill()


def fleet_of(
    folder: Path | str,
    run_dir: Path,
    weights: GatheredWeights | None = None,
    max_model_len: int = MAX_MODEL_LEN,
    **changes,
) -> ServerFleet:
    return ServerFleet(
        RunConfig(rollout=rollout_config(**changes)),
        model_path=str(folder),
        max_model_len=max_model_len,
        eos_ids=[EOS],
        run_dir=run_dir,
        weights=weights,
    )


@dataclass
class Served:
    """Running servers, the checkpoint that they loaded, and another of the same shape."""

    fleet: ServerFleet
    weights: GatheredWeights  # which the fleet pushes
    folder: Path
    other: Path
    first_decode: Completion  # greedy, before anything was pushed
    next_version: int = 1

    def push(self, folder: Path) -> int:
        """Push a checkpoint's weights from this process; returns the version."""
        for name, tensor in load_file(folder / "model.safetensors").items():
            for _, parameter, _ in self.weights._slices[name]:
                parameter.copy_(tensor)
        version = self.new_version()
        self.fleet.push(version)
        return version

    def new_version(self) -> int:
        self.next_version += 1
        return self.next_version - 1

    def decode(self) -> list[Completion]:
        return decode_greedily(self.fleet.clients, PROMPT, 24)


@contextmanager
def serve(base: Path, *, tied: bool, servers: int) -> Iterator[Served]:
    folder = write_checkpoint(base / "first", seed=1, tied=tied)
    other = write_checkpoint(base / "other", seed=2, tied=tied)
    weights = half_weights(folder, 0, 1)
    with fleet_of(folder, base / "run", weights, servers=servers) as fleet:
        yield Served(fleet, weights, folder, other, decode_greedily(fleet.clients[:1], PROMPT, 24)[0])
