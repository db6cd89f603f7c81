"""Checks of precision, FP8 and the optimizer that need no device. models/precision.py has those that ask the device."""

from __future__ import annotations

from rlad_megatron.config.tree import TRANSFORMER_ENGINE, Fp8Config, ModelConfig, RunConfig
from rlad_megatron.errors import ConfigError


def validate_precision(config: RunConfig) -> None:
    """Check what each model is held and multiplied in, and the optimizer. Raises ConfigError."""
    for role, model in config.models:
        _validate_model(role, model)
    _validate_student(config)
    if len(config.models) > 1:
        _validate_teacher(config.teacher.fp8)
    _validate_optimizer(config)
    if not config.train.gpus_per_node:
        _validate_cpu_run(config)


def _validate_model(role: str, model: ModelConfig) -> None:
    fp8, defaults = model.fp8, Fp8Config()
    if model.precision == "fp32" and model.transformer_impl == TRANSFORMER_ENGINE:
        raise ConfigError(
            f"{role}.precision=fp32 with {role}.transformer_impl={TRANSFORMER_ENGINE}: its fused attention has no "
            "float32; use transformer_impl=auto, or precision=bf16"
        )
    if not fp8.enabled:
        for name in ("format", "amax_history_len", "amax_compute", "param_gather", "first_last_layers_bf16"):
            if getattr(fp8, name) != getattr(defaults, name):
                raise ConfigError(
                    f"{role}.fp8.{name}={str(getattr(fp8, name)).lower()} has no effect with {role}.fp8.recipe=none; "
                    "choose a recipe, or drop it"
                )
        return
    if model.precision != "bf16":
        raise ConfigError(
            f"{role}.fp8.recipe={fp8.recipe} needs {role}.precision=bf16 for everything that is not in FP8, but "
            f"{role}.precision={model.precision}; use bf16, or fp8.recipe=none"
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
                    f"{role}.fp8.{name}={getattr(fp8, name)} has no effect with {role}.fp8.recipe={fp8.recipe}, which "
                    "takes scales from the current values; drop it, or use fp8.recipe=delayed"
                )
    elif fp8.first_last_layers_bf16:
        raise ConfigError(
            f"{role}.fp8.first_last_layers_bf16=true: delayed scaling enters FP8 once for all layers; "
            f"use {role}.fp8.recipe=tensorwise or blockwise, or first_last_layers_bf16=false"
        )


def _validate_student(config: RunConfig) -> None:
    fp8, optimizer = config.student.fp8, config.optimizer
    if not fp8.param_gather:
        return
    if fp8.recipe == "delayed":
        raise ConfigError(
            "student.fp8.param_gather=true with fp8.recipe=delayed would round the loaded weights at scale 1, since "
            "they have no history yet; use tensorwise, blockwise or mxfp8, or param_gather=false"
        )
    if optimizer.offload:
        raise ConfigError(
            f"optimizer.offload={optimizer.offload:g}: Megatron's hybrid optimizer updates FP8 weights only under "
            "delayed scaling; use student.fp8.param_gather=false, or offload=0"
        )
    if fp8.recipe == "mxfp8" and optimizer.overlap_param_gather:
        raise ConfigError(
            "optimizer.overlap_param_gather=true: MXFP8 weights are gathered through the gradient buffer, which the "
            "next forward would still hold; use overlap_param_gather=false, or student.fp8.param_gather=false"
        )


def _validate_teacher(fp8: Fp8Config) -> None:
    if fp8.recipe == "delayed":
        raise ConfigError(
            "teacher.fp8.recipe=delayed: its scales come from training steps, which a frozen model never makes, so all "
            "would stay 1; use tensorwise, blockwise or mxfp8"
        )
    if fp8.param_gather:
        raise ConfigError(
            "teacher.fp8.param_gather=true: a frozen model gathers nothing, and any FP8 recipe keeps its weights in "
            "FP8; use false"
        )


def _validate_optimizer(config: RunConfig) -> None:
    optimizer, precision = config.optimizer, config.student.precision
    if optimizer.precision_aware and precision != "bf16":
        raise ConfigError(
            f"optimizer.precision_aware=true splits float32 into a bf16 weight and its remainder, but student.precision"
            f"={precision}; use bf16, or precision_aware=false"
        )
    if optimizer.moments != "fp32" and not optimizer.precision_aware:
        raise ConfigError(
            f"optimizer.moments={optimizer.moments} needs optimizer.precision_aware=true; set it, or use moments=fp32"
        )
    if optimizer.offload and not optimizer.precision_aware:
        raise ConfigError(
            f"optimizer.offload={optimizer.offload:g} needs optimizer.precision_aware=true, because Megatron's hybrid "
            "optimizer takes that path; set it, or use offload=0"
        )
    if optimizer.offload and optimizer.moments != "fp32":
        raise ConfigError(
            f"optimizer.moments={optimizer.moments}: Megatron's hybrid optimizer holds float32 moments only; "
            "use moments=fp32, or optimizer.offload=0"
        )
    if optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce:
        raise ConfigError(
            "optimizer.overlap_param_gather=true needs optimizer.overlap_grad_reduce=true (Megatron's buckets); "
            "set both, or neither"
        )


def _validate_cpu_run(config: RunConfig) -> None:
    """Transformer Engine has no CPU build, so a CPU run can use nothing that Megatron builds on it."""
    optimizer = config.optimizer
    on_gpus = [
        ("optimizer.precision_aware", "true", "false", optimizer.precision_aware),
        ("optimizer.offload", f"{optimizer.offload:g}", "0", optimizer.offload > 0),
    ]
    for role, model in config.models:
        impl, recipe = model.transformer_impl, model.fp8.recipe
        on_gpus.append((f"{role}.transformer_impl", impl, "auto", impl == TRANSFORMER_ENGINE))
        on_gpus.append((f"{role}.fp8.recipe", recipe, "none", model.fp8.enabled))
    for name, value, remedy, used in on_gpus:
        if used:
            raise ConfigError(
                f"{name}={value} needs a GPU, but train.gpus_per_node=0 runs on CPUs; use {name}={remedy}"
            )
