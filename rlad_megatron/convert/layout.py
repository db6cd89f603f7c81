"""The chunks of a Megatron checkpoint that each rank of a layout writes.

Pure bookkeeping on shapes, the same in every process.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlad_megatron.errors import ConfigError
from rlad_megatron.models.box import Box
from rlad_megatron.models.megatron_tensors import Block, model_blocks
from rlad_megatron.models.shard_plan import check_divides, deal, layers_per_stage
from rlad_megatron.models.spec import ModelSpec


@dataclass(frozen=True)
class CheckpointLayout:
    """The layout that a checkpoint is written for: its chunks are those that Megatron would write in it."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1  # model chunks of each pipeline stage
    expert_parallel: int = 1

    def __str__(self) -> str:
        return (
            f"TP {self.tensor_parallel} PP {self.pipeline_parallel} "
            f"VPP {self.virtual_pipeline} EP {self.expert_parallel}"
        )


@dataclass(frozen=True)
class Chunk:
    """A part of a block that one rank writes."""

    block: Block
    box: Box  # in the block with padded vocabulary


def check_layout(spec: ModelSpec, layout: CheckpointLayout) -> None:
    """Raise ConfigError if Megatron could not cut the model this way."""
    tp, pp = layout.tensor_parallel, layout.pipeline_parallel
    vpp, ep = layout.virtual_pipeline, layout.expert_parallel
    for option, value in (("--tp", tp), ("--pp", pp), ("--vpp", vpp), ("--ep", ep)):
        if value < 1:
            raise ConfigError(f"{option} {value} must be at least 1")
    width = {"width of an expert": spec.expert_ffn_size} if spec.num_experts else {"feed-forward width": spec.ffn_size}
    check_divides("--tp ", tp, {"attention heads": spec.num_heads, **width}, kv_heads=spec.num_kv_heads)
    if pp > spec.num_layers:
        raise ConfigError(f"--pp {pp} exceeds the {spec.num_layers} layers of this model; use fewer")
    if vpp > 1 and (pp == 1 or pp * vpp > spec.num_layers):
        raise ConfigError(
            f"--vpp {vpp}: {spec.num_layers} layers do not fill {vpp} chunks on each of {pp} stages; "
            "--pp must exceed 1, and --pp times --vpp must not exceed the layers"
        )
    if ep > 1 and (not spec.num_experts or spec.num_experts % ep):
        raise ConfigError(f"--ep {ep} does not divide the {spec.num_experts} experts of this model; use a divisor")


def stage_of_layer(num_layers: int, layout: CheckpointLayout) -> list[int]:
    """The pipeline stage of each layer. With virtual stages, chunks of layers are dealt round-robin to the stages.

    If the layers do not divide evenly, the outer chunks take the remainder (Megatron-Core:
    `pipeline_model_parallel_layout` with virtual stages, else `num_layers_in_first_pipeline_stage` and `..._last_...`).
    """
    pp = layout.pipeline_parallel
    stages = deal(layers_per_stage(num_layers, pp * layout.virtual_pipeline), pp)
    stage_of = {layer: stage for stage, chunks in enumerate(stages) for chunk in chunks for layer in chunk}
    return [stage_of[layer] for layer in range(num_layers)]


def rank_chunks(spec: ModelSpec, layout: CheckpointLayout) -> list[list[Chunk]]:
    """The chunks that each rank of one model copy writes. Together they cover every element of the model once.

    Ranks are ordered as pipeline stage, expert-parallel rank, tensor-parallel rank, the last one fastest. Of layers
    without experts, which are the same on all expert-parallel ranks, the first such rank writes.

    Raises:
        ConfigError: the model cannot be cut this way.
    """
    check_layout(spec, layout)
    tp, pp, ep = layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel
    stages = stage_of_layer(spec.num_layers, layout)
    ranks: list[list[Chunk]] = [[] for _ in range(pp * ep * tp)]
    for block in model_blocks(spec):
        stage = stages[block.place[0]] if block.place else (0 if block.key.startswith("embedding.") else pp - 1)
        expert_rank = block.place[1] // (spec.num_experts // ep) if len(block.place) > 1 else 0
        for tp_rank in range(1 if block.rule.replicated else tp):
            rank = (stage * ep + expert_rank) * tp + tp_rank
            ranks[rank] += [Chunk(block, cut) for cut in block.cuts(spec, tp, tp_rank)]
    return ranks


def split_evenly(sizes: list[int], parts: int) -> list[range]:
    """Cut a sequence into runs of about equal total size; some may be empty."""
    total, done, at, runs = sum(sizes), 0, 0, []
    for part in range(1, parts + 1):
        start = at
        while at < len(sizes) and (part == parts or done + sizes[at] / 2 <= total * part / parts):
            done += sizes[at]
            at += 1
        runs.append(range(start, at))
    return runs
