"""Compare logits of transformers with those of Megatron-Core, which loads the checkpoint by its own loader."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from rlad_megatron import platform
from rlad_megatron.config import LayoutConfig, ModelConfig
from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.models.shard_plan import check_layout
from rlad_megatron.models.torch_dist import find_iteration, is_megatron
from rlad_megatron.platform.megatron_versions import check_loadable

TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class LogitsComparison:
    """A Hugging Face folder and a Megatron checkpoint to run on the same tokens."""

    hf: str
    megatron: str
    config: str  # folder with the Megatron model's config.json
    tokens: torch.Tensor  # int64 [T]
    tp: int  # tensor-parallel size of the Megatron model

    def verify(self, console: Console, bound: float) -> None:
        """Run the folder with transformers and the checkpoint with Megatron-Core.

        Raises:
            CheckpointError: the logits differ by more than `bound`.
        """
        ours = megatron_logits(self.megatron, self.config, self.tokens, tp=self.tp)
        difference = (transformers_logits(self.hf, self.tokens) - ours).abs().max().item()
        console.print(f"logits of {len(self.tokens)} tokens at TP {self.tp}: largest difference {difference:.3g}")
        if not difference <= bound:
            raise CheckpointError(
                f"{self.hf} and {self.megatron}: logits differ by {difference:.3g}, more than --bound {bound:g}; "
                "compare the tensors"
            )


def prepare_comparison(first: str, second: str, config: str, *, tokens: str | None, tp: int) -> LogitsComparison:
    """Check everything that can be checked before a model is loaded.

    Args:
        tokens: ids, comma-separated; 32 random ones by default.

    Raises:
        ConfigError: not one folder of each format, a token outside the vocabulary, or a `tp` that does not divide the
            model.
        CheckpointError: a checkpoint that the installed Megatron-Core cannot load.
    """
    if is_megatron(first) == is_megatron(second):
        raise ConfigError("--logits compares a Hugging Face folder with a Megatron one; give one of each")
    hf, megatron = (second, first) if is_megatron(first) else (first, second)
    if tp < 1:
        raise ConfigError(f"--tp {tp} must be at least 1")
    check_loadable(find_iteration(megatron)[0])
    spec = read_model_spec(config)
    try:
        check_layout(spec, LayoutConfig(tp))
    except ConfigError as error:
        raise ConfigError(f"--tp {tp}: {error}") from error
    if not tokens:
        ids = torch.randint(0, spec.vocab_size, (32,), generator=torch.Generator().manual_seed(0))
    else:
        parts = [part.strip() for part in tokens.split(",")]
        if not all(part.isdigit() and int(part) < spec.vocab_size for part in parts):
            raise ConfigError(f"--tokens {tokens!r} must be ids below {spec.vocab_size}, comma-separated")
        ids = torch.tensor([int(part) for part in parts])
    return LogitsComparison(hf, megatron, config, ids, tp)


def transformers_logits(folder: str | Path, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [T, vocabulary] of tokens int64 [T]. Holds the whole model in memory."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return model(tokens[None]).logits[0].float()


def megatron_logits(folder: str | Path, config: str | Path, tokens: torch.Tensor, *, tp: int) -> torch.Tensor:
    """float32 [T, vocabulary] of tokens int64 [T], from a GPTModel over `tp` processes of this machine.

    Megatron-Core reads the checkpoint (`dist_checkpointing.load`), whatever layout it was written in.

    Args:
        folder: the Megatron checkpoint.
        config: folder with its config.json.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logits_TV = torch.empty(len(tokens), read_model_spec(config).vocab_size).share_memory_()
    torch.multiprocessing.spawn(_rank, (tp, port, str(folder), str(config), tokens, logits_TV), nprocs=tp)
    return logits_TV


@torch.no_grad()
def _rank(
    rank: int, tp: int, port: int, folder: str, config: str, tokens: torch.Tensor, logits_TV: torch.Tensor
) -> None:
    """The body of a tensor-parallel rank. The first one fills `logits_TV`."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(tp),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    platform.setup()
    from megatron.core import dist_checkpointing

    from rlad_megatron.models.build import build_model
    from rlad_megatron.models.forward import packed_seq_params
    from rlad_megatron.parallel.groups import build_groups, seed_everything

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // tp))
    platform.init_process_group(TIMEOUT_S)
    layout = LayoutConfig(tp)
    groups = build_groups(layout)
    seed_everything(0, groups)
    model = build_model(read_model_spec(config), ModelConfig(config, layout, "fp32", transformer_impl="local"), groups)
    path, _ = find_iteration(folder)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(path))["model"])
    model.eval()
    tokens = tokens.to(platform.device())
    one_segment = packed_seq_params(torch.tensor([0, len(tokens)], dtype=torch.int32), "local")
    positions = torch.arange(len(tokens), device=tokens.device)
    hidden_T1H = model(tokens[None], positions[None], None, packed_seq_params=one_segment)
    local_TV = torch.nn.functional.linear(hidden_T1H[:, 0], model.head_weight).float()
    parts = [torch.empty_like(local_TV) for _ in range(tp)]
    torch.distributed.all_gather(parts, local_TV, group=groups.tp)
    if rank == 0:
        logits_TV.copy_(torch.cat(parts, dim=-1)[:, : logits_TV.shape[1]])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
