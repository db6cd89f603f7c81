"""Checks that need nothing but the tree."""

from __future__ import annotations

import math
import os
import re
from dataclasses import fields, is_dataclass
from urllib.parse import urlsplit

from rlad_megatron.config.choices import (
    AGGREGATIONS,
    AMAX_COMPUTES,
    DECAYS,
    DTYPES,
    EXPORT_PRECISIONS,
    FP8_FORMATS,
    FP8_RECIPES,
    MISMATCH_CORRECTIONS,
    MOMENTS,
    PRECISIONS,
    PROMPT_STYLES,
    RECOMPUTES,
    TRANSFORMER_IMPLS,
    WEIGHT_TRANSFERS,
    divisors,
    either,
)
from rlad_megatron.config.objectives import OBJECTIVES
from rlad_megatron.config.placement import validate_placement
from rlad_megatron.config.precision import validate_precision
from rlad_megatron.config.tree import ModelConfig, RunConfig
from rlad_megatron.errors import ConfigError


def validate(config: RunConfig) -> None:
    """Check every field by itself and against the others.

    Raises:
        ConfigError: naming the field, its value and the remedy.
    """
    _validate_values(config)
    _validate_choices(config)
    _validate_ranges(config)
    _validate_models(config)
    validate_precision(config)
    validate_placement(config)
    _validate_together(config)


def _validate_choices(config: RunConfig) -> None:
    _choice("objective.name", config.objective.name, tuple(OBJECTIVES))
    _choice("objective.aggregation", config.objective.aggregation, AGGREGATIONS)
    _choice("objective.mismatch_correction", config.objective.mismatch_correction, MISMATCH_CORRECTIONS)
    _choice("optimizer.decay", config.optimizer.decay, DECAYS)
    _choice("rollout.dtype", config.rollout.dtype, DTYPES)
    _choice("rollout.weight_transfer", config.rollout.weight_transfer, WEIGHT_TRANSFERS)
    _choice("data.prompt_style", config.data.prompt_style, PROMPT_STYLES)
    _choice("checkpoint.export_precision", config.checkpoint.export_precision, EXPORT_PRECISIONS)
    _choice("optimizer.moments", config.optimizer.moments, MOMENTS)
    _choice("train.recompute", config.train.recompute, RECOMPUTES)
    for role, model in config.models:
        if model.precision == "fp8":
            raise ConfigError(
                f"{role}.precision=fp8: only products of the layers are in FP8, and the rest in bf16; "
                f"use {role}.precision=bf16 and {role}.fp8.recipe={'|'.join(FP8_RECIPES[1:])}"
            )
        _choice(f"{role}.precision", model.precision, PRECISIONS)
        _choice(f"{role}.transformer_impl", model.transformer_impl, TRANSFORMER_IMPLS)
        _choice(f"{role}.fp8.recipe", model.fp8.recipe, FP8_RECIPES)
        _choice(f"{role}.fp8.format", model.fp8.format, FP8_FORMATS)
        _choice(f"{role}.fp8.amax_compute", model.fp8.amax_compute, AMAX_COMPUTES)


def _validate_values(section, prefix: str = "") -> None:
    """What no field may hold, in all fields of a dataclass and of those in it."""
    for field in fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        if is_dataclass(value):
            _validate_values(value, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value} must be a finite number")
        elif isinstance(value, str) and (found := re.match(r"~|.*?(\$[\w{])", value)):
            # The home folder, read here, would be another one in a job's container.
            written_out = os.path.expandvars(os.path.expanduser(value))
            remedy = f"write it out: {written_out}" if written_out != value else "write it out"
            raise ConfigError(f"{name}={value}: {'$' if found[1] else '~'} is not expanded here; {remedy}")


def _validate_ranges(config: RunConfig) -> None:
    _within("objective.alpha", config.objective.alpha, 0.0, 1.0)
    _within("objective.eps_low", config.objective.eps_low, 0.0, 1.0)
    _within("rollout.sampling.top_p", config.rollout.sampling.top_p, 0.0, 1.0)
    _within("eval.sampling.top_p", config.eval.sampling.top_p, 0.0, 1.0)
    _within("rollout.sleep_level", config.rollout.sleep_level, 0, 2)
    _within("rollout.port", config.rollout.port, 1, 65536 - config.rollout.servers)
    _within("optimizer.beta1", config.optimizer.beta1, 0.0, 1.0)
    _within("optimizer.beta2", config.optimizer.beta2, 0.0, 1.0)
    _within("optimizer.offload", config.optimizer.offload, 0.0, 1.0)
    for name, value in (
        ("objective.teacher_clamp", config.objective.teacher_clamp),
        ("optimizer.lr", config.optimizer.lr),
        ("rollout.sampling.temperature", config.rollout.sampling.temperature),
        ("eval.sampling.top_p", config.eval.sampling.top_p),
        ("rollout.probe_bound", config.rollout.probe_bound),
        ("rollout.kv_cache_gb", config.rollout.kv_cache_gb),
        ("train.gpu_memory_gb", config.train.gpu_memory_gb),
        ("rollout.startup_timeout_s", config.rollout.startup_timeout_s),
        ("rollout.request_timeout_s", config.rollout.request_timeout_s),
    ):
        if value <= 0:
            raise ConfigError(f"{name}={value} must be a number above 0")
    _within("optimizer.min_lr", config.optimizer.min_lr, 0.0, config.optimizer.lr)
    for name, value in (
        ("objective.eps_high", config.objective.eps_high),
        ("objective.kl_coefficient", config.objective.kl_coefficient),
        ("eval.every", config.eval.every),
        ("eval.sampling.temperature", config.eval.sampling.temperature),
        ("checkpoint.every", config.checkpoint.every),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps),
        ("optimizer.weight_decay", config.optimizer.weight_decay),
        ("optimizer.clip_grad", config.optimizer.clip_grad),
        ("rollout.max_restarts", config.rollout.max_restarts),
        ("rollout.nodes", config.rollout.nodes),
        ("teacher.ranks_per_node", config.teacher.ranks_per_node),
        ("teacher.nodes", config.teacher.nodes),
        ("train.gpus_per_node", config.train.gpus_per_node),
        ("train.seed", config.train.seed),
        ("observe.rollouts_per_step", config.observe.rollouts_per_step),
    ):
        if value < 0:
            raise ConfigError(f"{name}={value} must not be negative")
    for name, value in (
        ("loss.memory_mb", config.loss.memory_mb),
        ("rollout.group_size", config.rollout.group_size),
        ("rollout.prompts_per_step", config.rollout.prompts_per_step),
        ("rollout.sampling.max_tokens", config.rollout.sampling.max_tokens),
        ("data.eval_size", config.data.eval_size),
        ("data.train_size", config.data.train_size),
        ("rollout.servers", config.rollout.servers),
        ("rollout.tensor_parallel", config.rollout.tensor_parallel),
        ("eval.sampling.max_tokens", config.eval.sampling.max_tokens),
        ("rollout.max_concurrency", config.rollout.max_concurrency),
        ("train.steps", config.train.steps),
        ("train.nodes", config.train.nodes),
        ("train.ranks_per_node", config.train.ranks_per_node),
        ("train.updates_per_rollout", config.train.updates_per_rollout),
        ("train.microbatch_tokens", config.train.microbatch_tokens),
        ("train.max_skipped_steps", config.train.max_skipped_steps),
        ("eval.samples", config.eval.samples),
        ("checkpoint.keep", config.checkpoint.keep),
        ("sft.batch_size", config.sft.batch_size),
    ):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    share = config.rollout.gpu_memory_utilization
    if not 0 < share <= 1:
        raise ConfigError(
            f"rollout.gpu_memory_utilization={share} must be above 0 and at most 1: a share of the GPU's memory; "
            "for 90% write 0.9"
        )
    if config.objective.mismatch_cap < 1:
        raise ConfigError(f"objective.mismatch_cap={config.objective.mismatch_cap} must be at least 1")
    if not config.data.people or any(not 2 <= people <= 8 for people in config.data.people):
        raise ConfigError(f"data.people={list(config.data.people)} must be numbers from 2 to 8, for example [2,3]")
    if not config.name or "/" in config.name or config.name in (".", ".."):
        raise ConfigError(f"name={config.name!r} must be a folder name; runs_dir says where the folder goes")


def _validate_models(config: RunConfig) -> None:
    trainers = "train.nodes * train.ranks_per_node"
    own = f"{'teacher' if config.teacher.nodes else 'train'}.nodes * teacher.ranks_per_node"
    worlds = {
        "student": (config.train.world_size, trainers),
        "teacher": (config.teacher_world_size, own if config.teacher_is_dedicated else trainers),
    }
    for role, model in config.models:
        _validate_layout(role, model, *worlds[role])
    if not config.student.path:
        raise ConfigError("student.path is empty; give a folder in Hugging Face format")
    if (config.needs_teacher or config.eval.teacher) and not config.teacher.path:
        why = f"objective.name={config.objective.name}" if config.needs_teacher else "eval.teacher=true"
        raise ConfigError(
            f"teacher.path is empty, but {why} needs a teacher; give a folder in Hugging Face format, "
            "or use objective.name=grpo and eval.teacher=false"
        )


def _validate_together(config: RunConfig) -> None:
    if OBJECTIVES[config.objective.name].needs_advantage and config.rollout.group_size == 1:
        raise ConfigError(
            f"rollout.group_size=1 gives no group-relative advantage for objective.name={config.objective.name}; "
            "use at least 2, or objective.name=on_policy_kl"
        )
    if config.rollout.sampling.top_p != 1.0:
        raise ConfigError(
            f"rollout.sampling.top_p={config.rollout.sampling.top_p} would make the sampler's distribution differ "
            "from the trained one; use 1.0 (evaluation has its own eval.sampling.top_p)"
        )
    if config.rollout.prompts_per_step % config.train.updates_per_rollout:
        raise ConfigError(
            f"train.updates_per_rollout={config.train.updates_per_rollout} does not divide "
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}: each update takes whole groups"
        )
    if config.eval.teacher and config.rollout.urls:
        raise ConfigError(
            "eval.teacher=true needs a server of its own for the teacher, but rollout.urls is set; "
            "use eval.teacher=false and `rlad evaluate`"
        )
    for url in config.rollout.urls:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"rollout.urls={url!r} is not the address of a server; write http://HOST:PORT")
    if config.train.distributed_timeout_s <= config.rollout.startup_timeout_s:
        raise ConfigError(
            f"train.distributed_timeout_s={config.train.distributed_timeout_s:g} must exceed rollout.startup_timeout_s="
            f"{config.rollout.startup_timeout_s:g}: the other ranks wait while rank 0 starts servers and generates"
        )


def _choice(field_name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{field_name}={value!r} is unknown; choose one of: {', '.join(choices)}")


def _within(field_name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{field_name}={value} is outside [{low:g}, {high:g}]")


def _validate_layout(role: str, model: ModelConfig, world_size: int, product: str) -> None:
    layout = model.layout
    for name in ("tensor_parallel", "pipeline_parallel"):
        if getattr(layout, name) < 1:
            raise ConfigError(f"{role}.layout.{name}={getattr(layout, name)} must be at least 1")
    if layout.sequence_parallel and layout.tensor_parallel == 1:
        raise ConfigError(
            f"{role}.layout.sequence_parallel=true shares tokens out over tensor-parallel ranks, but {role}.layout."
            "tensor_parallel=1; use at least 2, or sequence_parallel=false"
        )
    if world_size % layout.model_ranks:
        raise ConfigError(
            f"{role}.layout: tensor_parallel={layout.tensor_parallel} * pipeline_parallel={layout.pipeline_parallel} "
            f"does not divide the {world_size} ranks ({product}); use sizes whose product is "
            f"{either(divisors(world_size))}, or a multiple of {layout.model_ranks} ranks"
        )
