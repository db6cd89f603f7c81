"""Who writes what of a Megatron checkpoint: the chunks of every rank of a layout, dealt out to files.

Pure bookkeeping on shapes, the same in every process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlad_megatron.errors import ConfigError
from rlad_megatron.models.rules import ModelShape, Slices, model_shape
from rlad_megatron.models.shard_plan import layers_per_stage
from rlad_megatron.models.torch_dist import Block, model_blocks


@dataclass(frozen=True)
class CheckpointLayout:
    """The layout that a checkpoint is written for. Its chunks are those that Megatron would write there."""

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
    """A rectangle of a block that one rank writes."""

    block: Block
    slices: Slices  # of the block, whose vocabulary is padded

    @property
    def offsets(self) -> tuple[int, ...]:
        return (*self.block.index, *(start for start, _ in self.slices))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.slices)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def check_layout(shape: ModelShape, layout: CheckpointLayout) -> None:
    """Raise ConfigError where Megatron could not cut the model this way."""
    tp, pp = layout.tensor_parallel, layout.pipeline_parallel
    vpp, ep = layout.virtual_pipeline, layout.expert_parallel
    for option, value in (("--tp", tp), ("--pp", pp), ("--vpp", vpp), ("--ep", ep)):
        if value < 1:
            raise ConfigError(f"{option} {value} must be at least 1")
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        raise ConfigError(
            f"--tp {tp} neither divides the {shape.num_kv_heads} key-value heads of this model nor is a multiple of "
            "them; use a divisor or a multiple"
        )
    width, what = (
        (shape.expert_ffn_size, "width of an expert") if shape.num_experts else (shape.ffn_size, "feed-forward width")
    )
    for size, name in ((shape.num_heads, "attention heads"), (width, what)):
        if size % tp:
            raise ConfigError(f"--tp {tp} does not divide the {size} {name} of this model; use a divisor of {size}")
    if pp > shape.num_layers:
        raise ConfigError(f"--pp {pp} exceeds the {shape.num_layers} layers of this model; use fewer")
    if vpp > 1 and (pp == 1 or pp * vpp > shape.num_layers):
        raise ConfigError(
            f"--vpp {vpp}: {shape.num_layers} layers do not fill {vpp} chunks on each of {pp} stages; "
            "--pp must exceed 1, and --pp times --vpp must not exceed the layers"
        )
    if ep > 1 and (not shape.num_experts or shape.num_experts % ep):
        raise ConfigError(f"--ep {ep} does not divide the {shape.num_experts} experts of this model; use a divisor")


def stage_of_layer(num_layers: int, layout: CheckpointLayout) -> list[int]:
    """The pipeline stage of each layer. With virtual stages, chunks of layers go round the stages.

    Where the layers do not divide, the outer chunks take what is left (Megatron-Core: `pipeline_model_parallel_layout`
    with virtual stages, else `num_layers_in_first_pipeline_stage` and `..._last_...`).
    """
    pp = layout.pipeline_parallel
    counts = layers_per_stage(num_layers, pp * layout.virtual_pipeline)
    return [chunk % pp for chunk, count in enumerate(counts) for _ in range(count)]


def rank_chunks(hf_config, layout: CheckpointLayout) -> list[list[Chunk]]:
    """The chunks that each rank of one model copy writes: every element of the model once over all ranks.

    Ranks are ordered as pipeline stage, expert-parallel rank, tensor-parallel rank, the last one fastest. Layers
    without experts are the same on all expert-parallel ranks; the first of them writes.

    Raises:
        ConfigError: the model cannot be cut this way.
    """
    shape = model_shape(hf_config)
    check_layout(shape, layout)
    tp, pp, ep = layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel
    stages = stage_of_layer(shape.num_layers, layout)
    ranks: list[list[Chunk]] = [[] for _ in range(pp * ep * tp)]
    for block in model_blocks(hf_config):
        stage = stages[block.index[0]] if block.index else (0 if block.key.startswith("embedding.") else pp - 1)
        expert_rank = block.index[1] // (shape.num_experts // ep) if len(block.index) > 1 else 0
        for tp_rank in range(tp):
            rank = (stage * ep + expert_rank) * tp + tp_rank
            ranks[rank] += [Chunk(block, cut) for cut in block.rule.cuts(shape, tp, tp_rank)]
    return ranks


def split_evenly(sizes: list[int], parts: int) -> list[range]:
    """Cut a sequence into runs whose sizes sum to about the same; some may be empty."""
    total, done, at, runs = sum(sizes), 0, 0, []
    for part in range(1, parts + 1):
        start = at
        while at < len(sizes) and (part == parts or done + sizes[at] / 2 <= total * part / parts):
            done += sizes[at]
            at += 1
        runs.append(range(start, at))
    return runs
