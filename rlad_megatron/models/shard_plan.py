"""Which slice of which Hugging Face tensor lives where in which Megatron parameter.

Pure bookkeeping on shapes: no tensors, no process groups, no devices. One plan serves loading, export, the weight sync
of every step, and resharding (docs/architecture.md).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Final

from rlad_megatron.config import LayoutConfig, RunConfig
from rlad_megatron.config.checks import divisors, either
from rlad_megatron.errors import CheckpointError, ConfigError
from rlad_megatron.models.registry import EMBEDDING, FINAL_NORM, HEAD, Layer, as_model_spec, family_for
from rlad_megatron.models.rules import Piece, Rule
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.place import Place


@dataclass(frozen=True)
class ShardEntry:
    """One parameter of one rank. Rows that no piece covers are vocabulary padding and hold zeros."""

    name: str  # as in `models.build.named_parameters`
    shape: tuple[int, ...]  # of the rank's parameter
    pieces: tuple[Piece, ...]
    owner: bool  # this rank is the one that writes these slices on export and weight sync


def refuse_unknown(tensors: Mapping[str, Path]) -> None:
    """Raise CheckpointError that names the first of these tensors, given with their files, if there are any."""
    if tensors:
        name = min(tensors)
        raise CheckpointError(
            f"{tensors[name]}: tensor {name!r} is not in this model (and {len(tensors) - 1} more); "
            "the checkpoint is not of this model"
        )


def fingerprint(hf_shapes: dict[str, tuple[int, ...]]) -> str:
    """A short text that differs between models whose tensors differ in name or shape."""
    return hashlib.sha256(repr(sorted(hf_shapes.items())).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ShardPlan:
    """The plan of a whole model in one layout. `hf_shapes` lists every Hugging Face tensor once, in writing order."""

    spec: ModelSpec
    layout: LayoutConfig
    hf_shapes: dict[str, tuple[int, ...]]
    float32: frozenset[str]  # the tensors that are in float32 whatever the model's precision

    def entries(self, place: Place) -> tuple[ShardEntry, ...]:
        """What a rank holds. Over all ranks, the slices of owners tile each tensor exactly once."""
        rows = stage_rows(self.spec, self.layout, place.pp_rank, local_experts(self.spec, self.layout, place.ep_rank))
        return tuple(_entry(self.spec, row, self.layout, place) for row in rows)


def build_shard_plan(config: Any, layout: LayoutConfig) -> ShardPlan:
    """Plan a model over `layout`.

    Args:
        config: the model's spec, or its transformers configuration.
        layout: how the model is split over ranks.

    Raises:
        ConfigError: unknown `model_type`, or a layout that does not divide the model.
    """
    spec = as_model_spec(config)
    check_layout(spec, layout)
    hf_shapes: dict[str, tuple[int, ...]] = {}
    float32: set[str] = set()
    for row in stage_rows(spec):
        hf_shapes |= row.rule.hf_shapes(spec)
        float32 |= {*row.rule.hf} if row.rule.float32 else set()
    return ShardPlan(spec, layout, hf_shapes, frozenset(float32))


def counted_rows(spec: ModelSpec, layout: LayoutConfig, stage: int) -> list[tuple[Row, int]]:
    """The parameters of a pipeline stage and how many there are of each on a rank; one expert stands for all.

    For sizes only: fast where a plan's slices of thousands of experts are not. Raises as `build_shard_plan` does.
    """
    check_layout(spec, layout)
    experts = len(local_experts(spec, layout))
    return [(row, experts if row.is_expert else 1) for row in stage_rows(spec, layout, stage, range(min(experts, 1)))]


def local_experts(spec: ModelSpec, layout: LayoutConfig, ep_rank: int = 0) -> range:
    """The experts of each layer that an expert-parallel rank holds."""
    each = spec.num_experts // layout.expert_parallel
    return range(ep_rank * each, (ep_rank + 1) * each)


@dataclass(frozen=True)
class Row:
    """One parameter of a pipeline stage."""

    template: str  # its name in the table
    index: tuple[int, ...]  # (), (layer,) or (layer, expert), counted over the whole model
    table: Rule  # as the table has it
    rule: Rule  # with the layer and the expert filled in
    is_copy: bool = False  # of another stage's parameter

    @property
    def name(self) -> str:
        """As in `models.build.named_parameters`."""
        return self.template.format(**dict(zip(("layer", "expert"), self.index, strict=False)))

    @property
    def is_expert(self) -> bool:
        return len(self.index) > 1

    def tensor_parallel(self, layout: LayoutConfig) -> int:
        """Ranks over which it is split."""
        return layout.experts_tensor_parallel if self.is_expert else layout.tensor_parallel


def layer_of(spec: ModelSpec, layer: int) -> Layer:
    """What the family knows about a layer of the model."""
    return family_for(spec).layers[spec.layer_types[layer]]


WHOLE: Final = LayoutConfig()  # one rank


def stage_rows(
    spec: ModelSpec, layout: LayoutConfig = WHOLE, stage: int = 0, experts: range | None = None
) -> Iterator[Row]:
    """The parameters of a pipeline stage in layer order; by default of the whole model.

    experts: those of each layer; None for all.
    """
    experts = range(spec.num_experts) if experts is None else experts
    if stage == 0:
        yield Row("embedding.word_embeddings.weight", (), EMBEDDING, EMBEDDING)
    for layer in chain(*stage_chunks(spec.num_layers, layout)[stage]):
        for name, rule in layer_of(spec, layer).table.items():
            for expert in experts if "{expert}" in name else (None,):
                index = (layer,) if expert is None else (layer, expert)
                yield Row(name, index, rule, rule.at(layer, expert or 0))
    if stage == layout.pipeline_parallel - 1:
        yield Row("decoder.final_layernorm.weight", (), FINAL_NORM, FINAL_NORM)
        if not spec.tied:
            yield Row("output_layer.weight", (), HEAD, HEAD)
        elif stage > 0:
            # Megatron keeps a second copy of tied embeddings on the last stage; the first stage writes it out.
            yield Row("output_layer.weight", (), EMBEDDING, EMBEDDING, is_copy=True)


def _entry(spec: ModelSpec, row: Row, layout: LayoutConfig, place: Place) -> ShardEntry:
    tp_rank, copy = (place.expert_tp_rank, place.expert_dp_rank) if row.is_expert else (place.tp_rank, place.copy_rank)
    shape, pieces = pieces_of(row.table, spec, row.tensor_parallel(layout), tp_rank)
    names = dict(zip(row.table.hf, row.rule.hf, strict=True))
    pieces = tuple(Piece(names[piece.hf_name], piece.hf_slices, piece.local_slices) for piece in pieces)
    owner = copy == 0 and not row.is_copy and (tp_rank == 0 or not row.rule.replicated)
    return ShardEntry(row.name, shape, pieces, owner)


pieces_of = functools.cache(Rule.pieces)  # the same for all layers and experts


def stage_chunks(num_layers: int, layout: LayoutConfig) -> list[list[range]]:
    """The layers of each model chunk of each pipeline stage. Raises ConfigError if they do not fill the chunks.

    Source: megatron/core/transformer/transformer_layer.py:get_transformer_layer_offset.
    """
    stages, chunks = layout.pipeline_parallel, layout.virtual_pipeline
    counts = _stage_counts(num_layers, layout)
    if counts is None or any(count % chunks for count in counts):
        raise _unfilled(num_layers, layout)
    return deal([count // chunks for count in counts] * chunks, stages)


def deal(counts: list[int], stages: int) -> list[list[range]]:
    """Cut the layers into chunks of these sizes, and deal the chunks round-robin to the stages."""
    ends = list(accumulate(counts))
    chunks = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [chunks[stage::stages] for stage in range(stages)]


def _stage_counts(num_layers: int, layout: LayoutConfig) -> list[int] | None:
    """Layers of each pipeline stage; None if they do not fill the stages.

    If first and last stage have no numbers of their own, all others share the rest evenly.
    """
    first, last, stages = layout.first_stage_layers, layout.last_stage_layers, layout.pipeline_parallel
    if not first and not last:
        return layers_per_stage(num_layers, stages) if stages <= num_layers else None
    others, rest = stages - (first > 0) - (last > 0), num_layers - first - last
    if others < 0 or (rest != 0 if others == 0 else rest < others or rest % others):
        return None
    return [first] * (first > 0) + [rest // others if others else 0] * others + [last] * (last > 0)


def _unfilled(num_layers: int, layout: LayoutConfig) -> ConfigError:
    """The error for layers that do not fill the chunks, with the nearest value that works of the field to blame."""

    def works(field: str, value: int) -> bool:
        tried = replace(layout, **{field: value})  # type: ignore[arg-type]
        counts = _stage_counts(num_layers, tried)
        return counts is not None and not any(count % tried.virtual_pipeline for count in counts)

    fields = [name for name in ("first_stage_layers", "last_stage_layers") if getattr(layout, name)]
    if layout.virtual_pipeline > 1:
        fields.append("virtual_pipeline")
    fields.append("pipeline_parallel")
    asked = ", ".join(f"{name}={getattr(layout, name)}" for name in reversed(fields))
    remedies = []
    for name in fields:
        least = 2 if name == "pipeline_parallel" and layout.virtual_pipeline > 1 else 1
        found = [value for value in range(least, num_layers + 1) if works(name, value)]
        if found:
            nearest = min(found, key=lambda value: abs(value - getattr(layout, name)))
            remedies.append(f"{name}={nearest}")
    return ConfigError(f"layout.{asked}: {num_layers} layers do not fill the chunks; use {' or '.join(remedies)}")


def layers_per_stage(num_layers: int, stages: int) -> list[int]:
    """Transformer layers of each pipeline stage. If they do not divide evenly, the outer stages take the remainder.

    The outer stages also hold the embedding and the head. Megatron-Core lets only the first and the last stage differ
    from the rest (`num_layers_in_first_pipeline_stage`, `..._last_...`).
    """
    if num_layers % stages == 0:
        return [num_layers // stages] * stages
    for middle in (-(-num_layers // stages), num_layers // stages):
        rest = num_layers - middle * (stages - 2)
        if rest >= 2:
            return [rest - rest // 2, *[middle] * (stages - 2), rest // 2]
    raise ConfigError(
        f"layout.pipeline_parallel={stages}: {num_layers} layers do not fill {stages} stages; use at most {num_layers}"
    )


def check_layout(spec: ModelSpec, layout: LayoutConfig) -> None:
    """Raise ConfigError if the layout does not divide the model."""
    sizes = {"attention heads": spec.num_heads, "key-value heads": spec.num_kv_heads}
    experts = {"feed-forward width": spec.expert_ffn_size}
    sizes |= _sizes_of_some(spec)
    if not spec.num_experts:
        sizes["feed-forward width"] = spec.ffn_size
        for field, unset in (("expert_parallel", 1), ("expert_tensor_parallel", 0)):
            if getattr(layout, field) != unset:
                raise ConfigError(f"layout.{field}={getattr(layout, field)}: this model has no experts; use {unset}")
    elif layout.expert_tensor_parallel:
        check_divides("layout.expert_tensor_parallel=", layout.expert_tensor_parallel, experts)
    else:
        sizes |= experts
    check_divides("layout.tensor_parallel=", layout.tensor_parallel, sizes)
    if layout.expert_parallel > 1:
        check_divides("layout.expert_parallel=", layout.expert_parallel, {"experts": spec.num_experts})
    if layout.pipeline_parallel > spec.num_layers:
        raise ConfigError(
            f"layout.pipeline_parallel={layout.pipeline_parallel} exceeds the model's {spec.num_layers} layers; "
            f"use at most {spec.num_layers}"
        )
    if layout.cp_comm_type == "a2a":
        heads = math.gcd(spec.num_heads, spec.num_kv_heads) // layout.tensor_parallel
        _check_shared_heads(layout, "layout.cp_comm_type=a2a shares", heads, ", or cp_comm_type=p2p")
    if spec.gdn_key_heads:
        heads = math.gcd(spec.gdn_key_heads, spec.gdn_value_heads) // layout.tensor_parallel
        _check_shared_heads(layout, "gated delta nets share", heads)
    stage_chunks(spec.num_layers, layout)


def _sizes_of_some(spec: ModelSpec) -> dict[str, int]:
    """What else tensor parallelism must divide, if the model has it."""
    sizes = {
        "width of the shared expert": spec.shared_expert_ffn_size,
        "key heads of gated delta nets": spec.gdn_key_heads,
        "value heads of gated delta nets": spec.gdn_value_heads,
    }
    return {what: size for what, size in sizes.items() if size}


def _check_shared_heads(layout: LayoutConfig, who: str, heads: int, other: str = "") -> None:
    """Raise ConfigError if context-parallel ranks cannot share out the heads of a tensor-parallel rank."""
    if heads % layout.context_parallel:
        raise ConfigError(
            f"{who} heads out over context-parallel ranks, but layout.context_parallel={layout.context_parallel} does "
            f"not divide the {heads} that tensor_parallel={layout.tensor_parallel} leaves on a rank; use "
            f"{either(divisors(heads))}{other}"
        )


def check_divides(
    option: str, ranks: int, sizes: Mapping[str, int], model: str = "this model", *, kv_heads: int = 1
) -> None:
    """Raise ConfigError if `ranks` does not divide the sizes.

    option: its name, as messages write it before its value. kv_heads: for engines that repeat key-value heads if there
    are fewer of them than ranks; `ranks` must then be a divisor or a multiple.
    """

    def fits(count: int) -> bool:
        return kv_heads % count == 0 or count % kv_heads == 0

    remedy = f"use {either([size for size in divisors(math.gcd(*sizes.values())) if fits(size)])}"
    for what, size in sizes.items():
        if size % ranks:
            raise ConfigError(f"{option}{ranks} does not divide the {size} {what} of {model}; {remedy}")
    if not fits(ranks):
        raise ConfigError(
            f"{option}{ranks} neither divides the {kv_heads} key-value heads of {model} nor is a multiple of them; "
            f"{remedy}"
        )


def check_student_layout(spec: ModelSpec, layout: LayoutConfig) -> None:
    """Raise ConfigError if the model can be cut this way but not trained."""
    if spec.num_experts and layout.tensor_parallel > 1 and not layout.sequence_parallel:
        # Megatron-Core trains experts over tensor-parallel ranks only with sequence parallelism.
        raise ConfigError(
            f"student.layout.tensor_parallel={layout.tensor_parallel}: a student with experts needs "
            "student.layout.sequence_parallel=true with it; or use 1"
        )
    if spec.num_experts and layout.experts_tensor_parallel != layout.tensor_parallel and layout.expert_parallel == 1:
        # Megatron-Core would sum the experts' gradients over the ranks of the other parameters.
        raise ConfigError(
            f"student.layout.expert_tensor_parallel={layout.expert_tensor_parallel} differs from tensor_parallel="
            f"{layout.tensor_parallel}, which Megatron-Core trains only with student.layout.expert_parallel of at "
            "least 2; use that, or expert_tensor_parallel=0"
        )


def check_replayed_model(config: RunConfig, student: ModelSpec) -> None:
    """Raise ConfigError if routers are to replay what servers chose, but the student has none."""
    if config.rollout.router_replay and not student.num_experts:
        raise ConfigError(
            f"rollout.router_replay=true, but the student has no experts (student.path={config.student.path} is a "
            f"{student.model_type} model); use rollout.router_replay=false"
        )


def check_server_layout(spec: ModelSpec, tensor_parallel: int, role: str = "student") -> None:
    """Raise ConfigError, naming the role, if a vLLM server cannot cut the model over `tensor_parallel` GPUs."""
    sizes = {"attention heads": spec.num_heads, "feed-forward width": spec.ffn_size, **_sizes_of_some(spec)}
    check_divides("rollout.tensor_parallel=", tensor_parallel, sizes, f"the {role}", kv_heads=spec.num_kv_heads)


def check_vocabularies(student: ModelSpec, teacher: ModelSpec) -> None:
    """Raise ConfigError if the student's head has rows that the teacher's lacks, whether or not tokens use them."""
    if student.vocab_size > teacher.vocab_size:
        raise ConfigError(
            f"the student's vocabulary of {student.vocab_size} exceeds the teacher's {teacher.vocab_size}: the student "
            "could sample tokens that the teacher has no column for; use another teacher.path or student.path"
        )
