"""Compare logits of transformers with those of Megatron-Core, which loads the checkpoint by its own loader."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.filesize import decimal

from rlad_megatron import platform
from rlad_megatron.config import LayoutConfig, ModelConfig
from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.megatron_folder import find_iteration, is_megatron
from rlad_megatron.models.shard_plan import build_shard_plan, check_layout
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.platform.megatron_versions import check_loadable

TIMEOUT_S = 1800.0
BOUND = 1e-4  # of the largest difference, in float32
BYTES_PER_PARAMETER = 6  # measured: a model in float32 and what loading bf16 needs; one model is in memory at a time


@dataclass(frozen=True)
class LogitsComparison:
    """A Hugging Face folder and a Megatron checkpoint to run on the same tokens."""

    hf: str
    megatron: str
    spec: ModelSpec  # of the Megatron model
    tokens: torch.Tensor  # int64 [T]
    tp: int  # tensor-parallel size of the Megatron model
    dtype: torch.dtype | None = None  # to which the weights of both are rounded first

    def verify(self, console: Console, bound: float = BOUND, remedy: str = "compare the tensors") -> None:
        """Run the folder with transformers and the checkpoint with Megatron-Core.

        Raises:
            CheckpointError: the logits differ by more than `bound`, or transformers cannot load the folder.
        """
        ours = megatron_logits(self.megatron, self.spec, self.tokens, tp=self.tp, dtype=self.dtype)
        difference = (transformers_logits(self.hf, self.tokens, self.dtype) - ours).abs().max().item()
        console.print(f"logits of {len(self.tokens)} tokens at TP {self.tp}: largest difference {difference:.3g}")
        if not difference <= bound:
            raise CheckpointError(
                f"{self.hf} and {self.megatron}: logits differ by {difference:.3g}, more than the bound of {bound:g}; "
                f"{remedy}"
            )


def check_comparison(spec: ModelSpec, megatron: str | None) -> None:
    """Whether logits can be compared here. megatron: the checkpoint; None if it is not written yet.

    Raises:
        ConfigError: transformers has no such model, or this machine's memory does not hold one in float32.
        CheckpointError: the installed Megatron-Core cannot load the checkpoint.
    """
    import transformers

    if megatron:
        check_loadable(find_iteration(megatron)[0])

    skip = "or leave it out (convert: --no-verify; verify: without --logits)"
    if spec.model_type not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"model_type={spec.model_type!r}: comparing logits needs transformers, whose installed version "
            f"{transformers.__version__} has no such model; install a newer one, {skip}"
        )
    numel = sum(math.prod(shape) for shape in build_shard_plan(spec, LayoutConfig()).hf_shapes.values())
    needed, free = numel * BYTES_PER_PARAMETER, psutil.virtual_memory().available
    if platform.has_cuda():  # Megatron's side runs there
        free = min(free, torch.cuda.mem_get_info()[0])
    if needed > free:
        raise ConfigError(
            f"comparing logits needs about {decimal(needed)} of memory, and {decimal(free)} are free; use a larger "
            f"machine, {skip}"
        )


def prepare_comparison(
    first: str,
    second: str,
    spec: ModelSpec,
    *,
    tokens: str | None = None,
    tp: int = 1,
    dtype: torch.dtype | None = None,
) -> LogitsComparison:
    """Check everything that can be checked before a model is loaded.

    Args:
        spec: of the Megatron model.
        tokens: ids, comma-separated; 32 random ones by default.
        dtype: of the result of a conversion that changes it.

    Raises:
        ConfigError: not one folder of each format, a token outside the vocabulary, a `tp` that does not divide the
            model, or as `check_comparison`.
        CheckpointError: as `check_comparison`.
    """
    if is_megatron(first) == is_megatron(second):
        raise ConfigError("--logits compares a Hugging Face folder with a Megatron one; give one of each")
    hf, megatron = (second, first) if is_megatron(first) else (first, second)
    if tp < 1:
        raise ConfigError(f"--tp {tp} must be at least 1")
    check_comparison(spec, megatron)
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
    return LogitsComparison(hf, megatron, spec, ids, tp, dtype)


@torch.no_grad()
def transformers_logits(folder: str | Path, tokens: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """float32 [T, vocabulary] of tokens int64 [T]. Holds the whole model in memory.

    dtype: to which its weights are rounded first.

    Raises:
        CheckpointError: transformers cannot load the folder.
    """
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except Exception as error:  # of any kind, from a field of config.json
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} cannot load it ({type(error).__name__}: {why}); "
            "correct config.json, or install a newer transformers"
        ) from error
    _round(model, dtype)
    return model(tokens[None]).logits[0].float()


def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    for parameter in model.parameters() if dtype else ():
        parameter.copy_(parameter.to(dtype))


def megatron_logits(
    folder: str | Path, spec: ModelSpec, tokens: torch.Tensor, *, tp: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """float32 [T, vocabulary] of tokens int64 [T], from a GPTModel over `tp` processes of this machine.

    Megatron-Core reads the checkpoint (`dist_checkpointing.load`), whatever layout it was written in.

    Args:
        folder: the Megatron checkpoint.
        spec: of its model.
        dtype: to which its weights are rounded first.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logits_TV = torch.empty(len(tokens), spec.vocab_size).share_memory_()
    torch.multiprocessing.spawn(_rank, (tp, port, str(folder), spec, tokens, dtype, logits_TV), nprocs=tp)
    return logits_TV


@torch.no_grad()
def _rank(
    rank: int,
    tp: int,
    port: int,
    folder: str,
    spec: ModelSpec,
    tokens: torch.Tensor,
    dtype: torch.dtype | None,
    logits_TV: torch.Tensor,
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

    torch.set_num_threads(platform.cores_of_rank(tp))
    platform.init_process_group(TIMEOUT_S)
    layout = LayoutConfig(tp)
    groups = build_groups(layout)
    seed_everything(0, groups)
    (model,) = build_model(spec, ModelConfig(folder, layout, "fp32", transformer_impl="local"), groups)
    path, _ = find_iteration(folder)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(path))["model"])
    _round(model, dtype)
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
