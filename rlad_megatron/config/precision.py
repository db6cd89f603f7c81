"""Checks of what models are held and multiplied in, and of the optimizer."""

from __future__ import annotations

from rlad_megatron.config.choices import TRANSFORMER_ENGINE
from rlad_megatron.config.tree import Fp8Config, ModelConfig, RunConfig
from rlad_megatron.errors import ConfigError


def validate_precision(config: RunConfig) -> None:
    """Precision, layers and FP8 of each model, and the optimizer. What they ask of the device: models/precision.py."""
    for role, model in config.models:
        _validate_model(role, model)
    _validate_student(config)
    _validate_teacher(config)
    _validate_optimizer(config)
    if not config.train.gpus_per_node:
        _validate_cpu_run(config)


def _validate_model(role: str, model: ModelConfig) -> None:
    """What goes together in any model."""
    fp8, defaults = model.fp8, Fp8Config()
    if model.precision == "fp32" and model.transformer_impl == TRANSFORMER_ENGINE:
        raise ConfigError(
            f"{role}.precision=fp32 with {role}.transformer_impl={TRANSFORMER_ENGINE}: its fused attention "
            "knows no float32; use transformer_impl=auto, or precision=bf16"
        )
    if not fp8.enabled:
        for name in ("format", "amax_history_len", "amax_compute", "param_gather", "first_last_layers_bf16"):
            if getattr(fp8, name) != getattr(defaults, name):
                raise ConfigError(
                    f"{role}.fp8.{name}={str(getattr(fp8, name)).lower()} means nothing with {role}.fp8.recipe=none; "
                    "choose a recipe, or drop it"
                )
        return
    if model.precision != "bf16":
        raise ConfigError(
            f"{role}.fp8.recipe={fp8.recipe} needs {role}.precision=bf16 for all that is not in FP8, "
            f"got {role}.precision={model.precision}; use bf16, or fp8.recipe=none"
        )
    if model.transformer_impl == "local":
        raise ConfigError(
            f"{role}.fp8.recipe={fp8.recipe} needs Transformer Engine's layers, but {role}.transformer_impl=local; "
            "use transformer_engine, or fp8.recipe=none"
        )
    if fp8.recipe != "delayed":
        for name in ("amax_history_len", "amax_compute"):
            if getattr(fp8, name) != getattr(defaults, name):
                raise ConfigError(
                    f"{role}.fp8.{name}={getattr(fp8, name)} means nothing to {role}.fp8.recipe={fp8.recipe}, which "
                    "takes its scales from the present values; drop it, or use fp8.recipe=delayed"
                )
        return
    if fp8.amax_history_len < 1:
        raise ConfigError(f"{role}.fp8.amax_history_len={fp8.amax_history_len} must be at least 1")
    if fp8.first_last_layers_bf16:
        raise ConfigError(
            f"{role}.fp8.first_last_layers_bf16=true: delayed scaling enters FP8 once for all layers; "
            f"use {role}.fp8.recipe=tensorwise or blockwise, or first_last_layers_bf16=false"
        )


def _validate_student(config: RunConfig) -> None:
    fp8 = config.student.fp8
    if fp8.param_gather and fp8.recipe == "delayed":
        raise ConfigError(
            "student.fp8.param_gather=true with fp8.recipe=delayed would round the loaded weights at scale 1, since no "
            "history of theirs is there yet; use tensorwise, blockwise or mxfp8, or param_gather=false"
        )
    if fp8.param_gather and config.optimizer.offload:
        raise ConfigError(
            f"optimizer.offload={config.optimizer.offload:g}: Megatron's hybrid optimizer updates FP8 weights under "
            "delayed scaling alone; use student.fp8.param_gather=false, or offload=0"
        )
    if fp8.param_gather and fp8.recipe == "mxfp8" and config.optimizer.overlap_param_gather:
        raise ConfigError(
            "optimizer.overlap_param_gather=true: MXFP8 weights are gathered through the gradients' buffer, which the "
            "next forward would still hold; use overlap_param_gather=false, or student.fp8.param_gather=false"
        )


def _validate_teacher(config: RunConfig) -> None:
    if len(config.models) == 1:
        return
    fp8 = config.teacher.fp8
    if fp8.recipe == "delayed":
        raise ConfigError(
            "teacher.fp8.recipe=delayed: scales follow from training steps, which a frozen model never makes, so all "
            "would stay 1; use tensorwise, blockwise or mxfp8"
        )
    if fp8.param_gather:
        raise ConfigError(
            "teacher.fp8.param_gather=true: a frozen model gathers nothing, and its weights are in FP8 with any "
            "recipe; use false"
        )


def _validate_optimizer(config: RunConfig) -> None:
    optimizer, precision = config.optimizer, config.student.precision
    if optimizer.precision_aware and precision != "bf16":
        raise ConfigError(
            f"optimizer.precision_aware=true splits float32 into a bf16 weight and its rest, but student.precision="
            f"{precision}; use bf16, or precision_aware=false"
        )
    if optimizer.moments != "fp32" and not optimizer.precision_aware:
        raise ConfigError(
            f"optimizer.moments={optimizer.moments} needs optimizer.precision_aware=true; set it, or use moments=fp32"
        )
    if optimizer.offload and not optimizer.precision_aware:
        raise ConfigError(
            f"optimizer.offload={optimizer.offload:g} needs optimizer.precision_aware=true, whose way through Megatron "
            "its hybrid optimizer takes; set it, or use offload=0"
        )
    if optimizer.offload and optimizer.moments != "fp32":
        raise ConfigError(
            f"optimizer.moments={optimizer.moments}: Megatron's hybrid optimizer holds float32 moments alone; "
            "use moments=fp32, or optimizer.offload=0"
        )
    if optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce:
        raise ConfigError(
            "optimizer.overlap_param_gather=true needs optimizer.overlap_grad_reduce=true (Megatron's buckets); "
            "set both, or neither"
        )


def _validate_cpu_run(config: RunConfig) -> None:
    """Transformer Engine has no CPU build, and what Megatron builds on it goes with it."""
    wanted = [
        (f"{role}.{name}", value, remedy)
        for role, model in config.models
        for name, value, remedy in (
            ("fp8.recipe", model.fp8.recipe if model.fp8.enabled else "", "none"),
            (
                "transformer_impl",
                model.transformer_impl if model.transformer_impl == TRANSFORMER_ENGINE else "",
                "auto",
            ),
        )
    ]
    wanted += [
        ("optimizer.precision_aware", "true" if config.optimizer.precision_aware else "", "false"),
        ("optimizer.offload", f"{config.optimizer.offload:g}" if config.optimizer.offload else "", "0"),
    ]
    for name, value, remedy in wanted:
        if value:
            raise ConfigError(
                f"{name}={value} needs a GPU, but train.gpus_per_node=0 asks for a run on CPUs; use {name}={remedy}"
            )
