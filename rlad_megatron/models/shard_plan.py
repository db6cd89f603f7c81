"""Which slice of which Hugging Face tensor lives where in which Megatron parameter.

Pure bookkeeping on shapes: no tensors, no process groups, no devices. One plan serves loading, export, the weight sync
of every step, and resharding (docs/architecture.md).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlad_megatron.config import LayoutConfig
from rlad_megatron.config.checks import divisors, either
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.registry import EMBEDDING, FINAL_NORM, HEAD, as_model_spec, family_for
from rlad_megatron.models.rules import Piece, Rule
from rlad_megatron.models.spec import ModelSpec


@dataclass(frozen=True)
class ShardEntry:
    """One parameter of one rank. Rows that no piece covers are vocabulary padding and hold zeros."""

    name: str  # as in `models.build.named_parameters`
    shape: tuple[int, ...]  # of the rank's parameter
    pieces: tuple[Piece, ...]
    owner: bool  # this tensor-parallel rank is the one that writes these slices on export and weight sync


def fingerprint(hf_shapes: dict[str, tuple[int, ...]]) -> str:
    """A short text that differs between models whose tensors differ in name or shape."""
    return hashlib.sha256(repr(sorted(hf_shapes.items())).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ShardPlan:
    """The plan of a whole model in one layout.

    `hf_shapes` lists every Hugging Face tensor once, in writing order; `ranks[pp_rank][tp_rank]` is what that rank
    holds.
    """

    hf_shapes: dict[str, tuple[int, ...]]
    ranks: tuple[tuple[tuple[ShardEntry, ...], ...], ...]

    def entries(self, *, tp_rank: int, pp_rank: int) -> tuple[ShardEntry, ...]:
        return self.ranks[pp_rank][tp_rank]


def build_shard_plan(config: Any, layout: LayoutConfig) -> ShardPlan:
    """Plan a model over `layout`.

    Args:
        config: the model's spec, or its transformers configuration.
        layout: tensor- and pipeline-parallel sizes.

    Raises:
        ConfigError: unknown `model_type`, or a layout that does not divide the model.
    """
    spec = as_model_spec(config)
    check_layout(spec, layout)
    tp, pp = layout.tensor_parallel, layout.pipeline_parallel

    hf_shapes: dict[str, tuple[int, ...]] = {}
    for row in stage_rows(spec):
        hf_shapes |= row.rule.hf_shapes(spec)
    ranks = []
    for stage in range(pp):
        rows = list(stage_rows(spec, pp, stage))
        ranks.append(tuple(tuple(_entry(spec, row, tp, tp_rank) for row in rows) for tp_rank in range(tp)))
    return ShardPlan(hf_shapes, tuple(ranks))


def counted_rows(spec: ModelSpec, layout: LayoutConfig, stage: int) -> list[tuple[str, Rule, int]]:
    """(parameter name, rule, count) for the parameters of a pipeline stage; one expert stands for all.

    For sizes only: fast where a plan's slices of thousands of experts are not. Raises as `build_shard_plan` does.
    """
    check_layout(spec, layout)
    rows = stage_rows(spec, layout.pipeline_parallel, stage, max_experts=1)
    return [(row.name, row.table, spec.num_experts if len(row.index) > 1 else 1) for row in rows]


@dataclass(frozen=True)
class Row:
    """One parameter of a pipeline stage."""

    template: str  # its name in the table
    index: tuple[int, ...]  # (), (layer,) or (layer, expert); layers are counted from the stage's first
    table: Rule  # as the table has it
    rule: Rule  # with the layer and the expert filled in
    is_copy: bool = False  # of another stage's parameter

    @property
    def name(self) -> str:
        """As in `models.build.named_parameters`."""
        return self.template.format(**dict(zip(("layer", "expert"), self.index, strict=False)))


def stage_rows(spec: ModelSpec, stages: int = 1, stage: int = 0, max_experts: int | None = None) -> Iterator[Row]:
    """The parameters of a pipeline stage in layer order; by default of the whole model.

    max_experts: list only the first ones of each layer.
    """
    counts = layers_per_stage(spec.num_layers, stages)
    if stage == 0:
        yield Row("embedding.word_embeddings.weight", (), EMBEDDING, EMBEDDING)
    for local in range(counts[stage]):
        for name, rule in family_for(spec).layer.items():
            for expert in range(max_experts or spec.num_experts) if "{expert}" in name else (None,):
                index = (local,) if expert is None else (local, expert)
                yield Row(name, index, rule, rule.at(sum(counts[:stage]) + local, expert or 0))
    if stage == stages - 1:
        yield Row("decoder.final_layernorm.weight", (), FINAL_NORM, FINAL_NORM)
        if not spec.tied:
            yield Row("output_layer.weight", (), HEAD, HEAD)
        elif stage > 0:
            # Megatron keeps a second copy of tied embeddings on the last stage; the first stage writes it out.
            yield Row("output_layer.weight", (), EMBEDDING, EMBEDDING, is_copy=True)


def _entry(spec: ModelSpec, row: Row, tp: int, tp_rank: int) -> ShardEntry:
    shape, pieces = pieces_of(row.table, spec, tp, tp_rank)
    names = dict(zip(row.table.hf, row.rule.hf, strict=True))
    pieces = tuple(Piece(names[piece.hf_name], piece.hf_slices, piece.local_slices) for piece in pieces)
    owner = not row.is_copy and (tp_rank == 0 or not row.rule.replicated)
    return ShardEntry(row.name, shape, pieces, owner)


pieces_of = functools.cache(Rule.pieces)  # the same for all layers and experts


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
    sizes = {
        "attention heads": spec.num_heads,
        "key-value heads": spec.num_kv_heads,
        "feed-forward width": spec.expert_ffn_size if spec.num_experts else spec.ffn_size,
    }
    check_divides("layout.tensor_parallel=", layout.tensor_parallel, sizes)
    if layout.pipeline_parallel > spec.num_layers:
        raise ConfigError(
            f"layout.pipeline_parallel={layout.pipeline_parallel} exceeds the model's {spec.num_layers} layers; "
            f"use at most {spec.num_layers}"
        )
    if layout.cp_comm_type == "a2a":
        heads = math.gcd(spec.num_heads, spec.num_kv_heads) // layout.tensor_parallel
        if heads % layout.context_parallel:
            raise ConfigError(
                f"layout.cp_comm_type=a2a shares heads out over context-parallel ranks, but context_parallel="
                f"{layout.context_parallel} does not divide the {heads} that tensor_parallel={layout.tensor_parallel} "
                f"leaves on a rank; use {either(divisors(heads))}, or cp_comm_type=p2p"
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


def check_server_layout(spec: ModelSpec, tensor_parallel: int, role: str = "student") -> None:
    """Raise ConfigError, naming the role, if a vLLM server cannot cut the model over `tensor_parallel` GPUs."""
    sizes = {"attention heads": spec.num_heads, "feed-forward width": spec.ffn_size}
    check_divides("rollout.tensor_parallel=", tensor_parallel, sizes, f"the {role}", kv_heads=spec.num_kv_heads)


def check_vocabularies(student: ModelSpec, teacher: ModelSpec) -> None:
    """Raise ConfigError if the student's head has rows that the teacher's lacks, whether or not tokens use them."""
    if student.vocab_size > teacher.vocab_size:
        raise ConfigError(
            f"the student's vocabulary of {student.vocab_size} exceeds the teacher's {teacher.vocab_size}: the student "
            "could sample tokens that the teacher has no column for; use another teacher.path or student.path"
        )
