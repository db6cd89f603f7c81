"""What the engine tests share: tiny random Qwen3-MoE checkpoints, a hand-made shard plan, and running servers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
import transformers
from ports import free_port
from processes import children
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rlad_megatron.config import ModelConfig, RolloutConfig, RunConfig
from rlad_megatron.models.box import Box
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.models.perturb import perturbed
from rlad_megatron.models.shard_plan import Piece, ShardEntry
from rlad_megatron.servers import process
from rlad_megatron.servers.client import Completion
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.process import VllmServer
from rlad_megatron.servers.sampling import decode_greedily
from rlad_megatron.servers.transfer.choice import ON_CPUS, TransferChoice
from rlad_megatron.types import Prompt, Sample

VOCAB = 200
EOS = 7
MAX_MODEL_LEN = 256
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]
SLEEPS = TransferChoice("shared_memory", sleep_level=2)


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
    config = Qwen3MoeConfig(
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
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,  # CPU servers pad it
        norm_topk_prob=True,
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    return folder


@lru_cache(maxsize=4)
def _hf_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def hf_log_probs(folder: Path, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """float32 [R]: what transformers says of the response."""
    with torch.no_grad():
        logits = _hf_model(folder)(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return log_probs.gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)


class HfStudent:
    """A student whose log-probs transformers computes: weights over a hand-made plan, and a folder's configuration.

    Each rank holds a band of rows; vectors are all on rank 0.
    """

    def __init__(self, folder: Path, rank: int = 0, ranks: int = 1, group: object = None) -> None:
        self.folder, self.parameters, entries, shapes = folder, {}, [], {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            rows = tensor.shape[0]
            start, stop = (rank * rows // ranks, (rank + 1) * rows // ranks) if tensor.dim() == 2 else (0, rows)
            others = tuple((0, size) for size in tensor.shape[1:])
            piece = Piece(name, Box(((start, stop), *others)), Box(((0, stop - start), *others)))
            local = tensor[start:stop].clone()
            entries.append(ShardEntry(f"local.{name}", tuple(local.shape), (piece,), tensor.dim() == 2 or rank == 0))
            self.parameters[f"local.{name}"], shapes[name] = local, tuple(tensor.shape)
        dtype = next(iter(self.parameters.values())).dtype
        self.weights = GatheredWeights(entries, self.parameters, shapes, dtype=dtype, group=group)

    def load(self, folder: Path) -> None:
        """Take a checkpoint's weights; only for one rank."""
        for name, tensor in load_file(folder / "model.safetensors").items():
            self.parameters[f"local.{name}"].copy_(tensor)

    def perturbed(self, bit):
        return perturbed(self.parameters.values(), bit)

    @torch.no_grad()
    def log_probs(self, samples: list[Sample], temperature: float | None = None) -> list[torch.Tensor]:
        config = AutoConfig.from_pretrained(self.folder)
        architecture = getattr(transformers, config.architectures[0])
        weights = dict(self.weights)
        model = architecture.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
        found = []
        for sample in samples:
            log_probs = torch.log_softmax(model(sample.tokens[None]).logits[0] / (temperature or 1.0), dim=-1)
            response = sample.tokens[sample.prompt_length :, None]
            found.append(log_probs[sample.prompt_length - 1 : -1].gather(1, response)[:, 0])
        return found


def kill_api_server(server: VllmServer) -> None:
    """SIGKILL vLLM's first process, as the kernel does when memory runs out."""
    supervisor = psutil.Process(server._supervisor.pid)
    supervisor.children()[0].kill()


def kill_engine(server: VllmServer) -> None:
    """SIGKILL vLLM's engine. Its first process lives on for some seconds."""
    (engine,) = children(server._supervisor.pid, "EngineCore", recursive=True)
    engine.kill()


def keep_old_weights(monkeypatch) -> None:
    """Servers that are started from now on load the weights of their start in place of what they receive."""
    monkeypatch.setattr(process, "RECORDER", "stale_worker.StaleWorker")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


def fleet_of(
    folder: Path | str,
    run_dir: Path,
    student: HfStudent | None = None,
    max_model_len: int = MAX_MODEL_LEN,
    transfer: TransferChoice = ON_CPUS,
    **changes,
) -> ServerFleet:
    config = RunConfig(student=ModelConfig(precision="fp32"), rollout=rollout_config(**changes))
    return ServerFleet(
        config,
        model_path=str(folder),
        max_model_len=max_model_len,
        eos_ids=[EOS],
        run_dir=run_dir,
        transfer=transfer,
        student=student,
        probe=[PROMPT, PROMPT[::-1]],
    )


def running(fleet: ServerFleet) -> dict[str, Any]:
    """The fields of a configuration whose external servers are this fleet's."""
    return {"urls": tuple(client.url for client in fleet.clients), "token_file": str(fleet._token_file)}


@dataclass
class Served:
    """Running servers, the checkpoint that they loaded, and another of the same shape."""

    fleet: ServerFleet
    student: HfStudent  # whose weights the fleet pushes
    folder: Path
    other: Path
    first_decode: Completion  # greedy, before anything was pushed
    next_version: int = 1

    def push(self, folder: Path) -> int:
        """Push a checkpoint's weights from this process; returns the version."""
        self.student.load(folder)
        version = self.new_version()
        self.fleet.push(version)
        return version

    def new_version(self) -> int:
        self.next_version += 1
        return self.next_version - 1

    def decode(self) -> list[Completion]:
        return [answer for (answer,) in decode_greedily(self.fleet.clients, [PROMPT], 24)]


@contextmanager
def serve(base: Path, *, tied: bool, servers: int, threads: int = 1) -> Iterator[Served]:
    """threads: of each server's engine."""
    folder = write_checkpoint(base / "first", seed=1, tied=tied)
    other = write_checkpoint(base / "other", seed=2, tied=tied)
    student = HfStudent(folder)
    fleet = fleet_of(folder, base / "run", student, servers=servers)
    with ExitStack() as stack:
        with patch.object(process.os, "sched_getaffinity", return_value=range(1 + threads * servers)):
            stack.enter_context(fleet)
        yield Served(fleet, student, folder, other, decode_greedily(fleet.clients[:1], [PROMPT], 24)[0][0])


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=str(i), tokens=(*PROMPT, i % 190), answer="", subset="", text="") for i in range(count)]


def kill_after(monkeypatch, server: VllmServer, *, answers: int, kill=kill_api_server) -> None:
    """Kill `server` as soon as it has given so many responses: in the middle of a batch on any machine."""
    sample, answered = server.client.sample, []

    async def counted(session, body):
        async for pair in sample(session, body):
            answered.append(pair)
            if len(answered) == answers:
                kill(server)
            yield pair

    monkeypatch.setattr(server.client, "sample", counted)


def assert_matches(decoded: Completion, folder: Path) -> None:
    expected = hf_log_probs(folder, PROMPT, decoded.tokens)
    torch.testing.assert_close(torch.tensor(decoded.log_probs), expected, atol=1e-4, rtol=0)


def assert_same_rollouts(groups, others) -> None:
    for one_group, other_group in zip(groups, others, strict=True):
        assert [rollout.tokens for rollout in one_group] == [rollout.tokens for rollout in other_group]
        for one, other in zip(one_group, other_group, strict=True):
            torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-4, rtol=0)
