"""Which slice of which Hugging Face tensor lives where in which Megatron parameter.

Pure bookkeeping on shapes: no tensors, no process groups, no devices. One plan serves loading, export, the weight sync
of every step, and resharding (docs/architecture.md).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from rlad_megatron.config import LayoutConfig
from rlad_megatron.config.checks import divisors, either
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.registry import as_model_spec, family_for
from rlad_megatron.models.rules import Piece, Rule
from rlad_megatron.models.spec import ModelSpec

__all__ = ["Piece", "ShardEntry", "ShardPlan", "build_shard_plan", "check_layout", "fingerprint", "layers_per_stage"]


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
    ranks = []
    for stage in range(pp):
        rows = _rows_of_stage(spec, pp, stage, experts=spec.num_experts)
        stage_ranks = []
        for tp_rank in range(tp):
            entries = []
            for name, rule, copy in rows:
                local_shape, pieces = rule.pieces(spec, tp, tp_rank)
                owner = not copy and (tp_rank == 0 or not rule.replicated)
                entries.append(ShardEntry(name, local_shape, pieces, owner))
                if not copy:
                    hf_shapes.update(rule.hf_shapes(spec))
            stage_ranks.append(tuple(entries))
        ranks.append(tuple(stage_ranks))
    return ShardPlan(hf_shapes, tuple(ranks))


def counted_rows(spec: ModelSpec, layout: LayoutConfig, stage: int) -> list[tuple[str, Rule, int]]:
    """(parameter name, rule, count) for the parameters of a pipeline stage; one expert stands for all.

    For sizes only: fast where a plan's slices of thousands of experts are not. Raises as `build_shard_plan` does.
    """
    check_layout(spec, layout)
    rows = _rows_of_stage(spec, layout.pipeline_parallel, stage, experts=1)
    return [(name, rule, spec.num_experts if ".experts." in name else 1) for name, rule, _ in rows]


def _rows_of_stage(spec: ModelSpec, stages: int, stage: int, *, experts: int) -> list[tuple[str, Rule, bool]]:
    """(parameter name, rule, is a copy of another stage's parameter) for each parameter of a pipeline stage.

    experts: how many of a layer to list.
    """
    family, counts = family_for(spec), layers_per_stage(spec.num_layers, stages)
    first, last = stage == 0, stage == stages - 1
    rows: list[tuple[str, Rule, bool]] = []
    if first:
        rows += [(name, rule, False) for name, rule in family.embedding]
    offset = sum(counts[:stage])
    for local in range(counts[stage]):
        for name, rule in family.layer:
            for expert in range(experts if "{expert}" in name else 1):
                rows.append((name.format(layer=local, expert=expert), rule.at(offset + local, expert), False))
    if last:
        rows += [(name, rule, False) for name, rule in family.final_norm]
        if not spec.tied:
            rows += [(name, rule, False) for name, rule in family.head]
        elif not first:
            # Megatron keeps a second copy of tied embeddings on the last stage; the first stage writes it out.
            rows += [(name, family.embedding[0][1], True) for name, _ in family.head]
    return rows


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
    tp, pp = layout.tensor_parallel, layout.pipeline_parallel
    sizes = {
        "attention heads": spec.num_heads,
        "key-value heads": spec.num_kv_heads,
        "feed-forward width": spec.ffn_size if not spec.num_experts else spec.expert_ffn_size,
    }
    for what, size in sizes.items():
        if size % tp:
            raise ConfigError(
                f"layout.tensor_parallel={tp} does not divide the {size} {what} of this model; "
                f"use {either(divisors(math.gcd(*sizes.values())))}"
            )
    if pp > spec.num_layers:
        raise ConfigError(
            f"layout.pipeline_parallel={pp} exceeds the model's {spec.num_layers} layers; use at most {spec.num_layers}"
        )


def check_student_layout(spec: ModelSpec, layout: LayoutConfig) -> None:
    """Raise ConfigError if the model can be cut this way but not trained."""
    if spec.num_experts and layout.tensor_parallel > 1 and not layout.sequence_parallel:
        # Megatron-Core trains experts over tensor-parallel ranks only with sequence parallelism.
        raise ConfigError(
            f"student.layout.tensor_parallel={layout.tensor_parallel}: a student with experts needs "
            "student.layout.sequence_parallel=true with it; or use 1"
        )


def check_server_layout(spec: ModelSpec, tensor_parallel: int) -> None:
    """Raise ConfigError if a vLLM server cannot cut the model over `tensor_parallel` GPUs.

    Unlike Megatron, vLLM repeats key-value heads if there are fewer of them than GPUs.
    """

    def splits_key_values(size: int) -> bool:
        return spec.num_kv_heads % size == 0 or size % spec.num_kv_heads == 0

    common = divisors(math.gcd(spec.num_heads, spec.ffn_size))
    remedy = f"use {either([size for size in common if splits_key_values(size)])}"
    for what, size in (("attention heads", spec.num_heads), ("feed-forward width", spec.ffn_size)):
        if size % tensor_parallel:
            raise ConfigError(
                f"rollout.tensor_parallel={tensor_parallel} does not divide the {size} {what} of the student; {remedy}"
            )
    if not splits_key_values(tensor_parallel):
        raise ConfigError(
            f"rollout.tensor_parallel={tensor_parallel} neither divides the {spec.num_kv_heads} key-value heads of "
            f"the student nor is a multiple of them; {remedy}"
        )


def check_vocabularies(student: ModelSpec, teacher: ModelSpec) -> None:
    """Raise ConfigError if the student's head has rows that the teacher's lacks, whether or not tokens use them."""
    if student.vocab_size > teacher.vocab_size:
        raise ConfigError(
            f"the student's vocabulary of {student.vocab_size} exceeds the teacher's {teacher.vocab_size}: the student "
            "could sample tokens that the teacher has no column for; use another teacher.path or student.path"
        )
