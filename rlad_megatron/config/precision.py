"""Checks of precision, FP8 and the optimizer that need no device. models/precision.py has those that ask the device."""

from __future__ import annotations

from dataclasses import asdict

from rlad_megatron.config.messages import Problems, shown
from rlad_megatron.config.tree import TRANSFORMER_ENGINE, Fp8Config, ModelConfig, RunConfig


def precision_problems(config: RunConfig) -> Problems:
    """Problems of what each model is held and multiplied in, and of the optimizer."""
    problems: Problems = {}
    for role, model in config.models:
        problems |= _model_problems(role, model) | _context_problems(role, model, config.train.gpus_per_node)
    problems |= _param_gather_problems(config)
    if len(config.models) > 1:
        fp8 = config.teacher.fp8
        problems |= {
            "teacher.fp8.recipe=delayed: its scales come from training steps, which a frozen model never makes, so all "
            "would stay 1; use tensorwise, blockwise or mxfp8": fp8.recipe == "delayed",
            "teacher.fp8.param_gather=true: a frozen model gathers nothing, and any FP8 recipe keeps its weights in "
            "FP8; use false": fp8.param_gather,
        }
    problems |= _optimizer_problems(config)
    return problems if config.train.gpus_per_node else problems | _cpu_problems(config)


def _model_problems(role: str, model: ModelConfig) -> Problems:
    fp8, recipe, impl = model.fp8, model.fp8.recipe, model.transformer_impl
    unsupported = model.precision == "fp32" and impl == TRANSFORMER_ENGINE
    ends = recipe == "delayed" and fp8.first_last_layers_bf16
    problems: Problems = {
        f"{role}.precision=fp32 with {role}.transformer_impl={TRANSFORMER_ENGINE}: its fused attention has no float32; "
        "use transformer_impl=auto, or precision=bf16": unsupported,
        f"{role}.fp8.recipe={recipe} needs {role}.precision=bf16 for everything that is not in FP8, but {role}."
        f"precision={model.precision}; use bf16, or fp8.recipe=none": fp8.enabled and model.precision != "bf16",
        f"{role}.fp8.recipe={recipe} needs Transformer Engine's layers, but {role}.transformer_impl=local; "
        "use transformer_engine, or fp8.recipe=none": fp8.enabled and impl == "local",
        f"{role}.fp8.first_last_layers_bf16=true: delayed scaling enters FP8 once for all layers; use {role}.fp8."
        "recipe=tensorwise or blockwise, or first_last_layers_bf16=false": ends,
    }
    current = ", which takes scales from the current values" if fp8.enabled else ""
    for name, value in asdict(fp8).items():
        of_delayed = name in ("amax_history_len", "amax_compute")
        problems[
            f"{role}.fp8.{name}={shown(value)} has no effect with {role}.fp8.recipe={recipe}{current}; "
            f"drop it, or use fp8.recipe={'delayed' if of_delayed else 'RECIPE'}"
        ] = value != getattr(Fp8Config(), name) and (recipe != "delayed" if of_delayed else not fp8.enabled)
    return problems


def _context_problems(role: str, model: ModelConfig, gpus: int) -> Problems:
    """Attention of local layers gathers all keys and values, which is meant for CPUs (models/attention.py)."""
    context, fp32 = model.layout.context_parallel, model.precision == "fp32"
    local = "precision=fp32" if fp32 else f"transformer_impl={model.transformer_impl}"
    return {
        f"{role}.layout.context_parallel={context} on GPUs needs Transformer Engine's attention, but {role}.{local} "
        f"takes Megatron's local layers; use {role}.precision=bf16 with transformer_impl=auto, or context_parallel=1": (
            gpus and context > 1 and (fp32 or model.transformer_impl == "local")
        ),
    }


def _param_gather_problems(config: RunConfig) -> Problems:
    fp8, optimizer = config.student.fp8, config.optimizer
    if not fp8.param_gather:
        return {}
    overlapped = fp8.recipe == "mxfp8" and optimizer.overlap_param_gather
    return {
        "student.fp8.param_gather=true with fp8.recipe=delayed would round the loaded weights at scale 1, since they "
        "have no history yet; use tensorwise, blockwise or mxfp8, or param_gather=false": fp8.recipe == "delayed",
        f"optimizer.offload={optimizer.offload:g}: Megatron's hybrid optimizer updates FP8 weights only under delayed "
        "scaling; use student.fp8.param_gather=false, or offload=0": optimizer.offload,
        "optimizer.overlap_param_gather=true: MXFP8 weights are gathered through the gradient buffer, which the next "
        "forward would still hold; use overlap_param_gather=false, or student.fp8.param_gather=false": overlapped,
    }


def _optimizer_problems(config: RunConfig) -> Problems:
    optimizer, precision = config.optimizer, config.student.precision
    aware, moments, offload = optimizer.precision_aware, optimizer.moments, optimizer.offload
    return {
        "optimizer.precision_aware=true splits float32 into a bf16 weight and its remainder, but student.precision="
        f"{precision}; use bf16, or precision_aware=false": aware and precision != "bf16",
        f"optimizer.moments={moments} needs optimizer.precision_aware=true; set it, or use moments=fp32": (
            moments != "fp32" and not aware
        ),
        f"optimizer.offload={offload:g} needs optimizer.precision_aware=true, because Megatron's hybrid optimizer "
        "takes that path; set it, or use offload=0": offload and not aware,
        f"optimizer.moments={moments}: Megatron's hybrid optimizer holds float32 moments only; use moments=fp32, or "
        "optimizer.offload=0": offload and moments != "fp32",
        "optimizer.overlap_param_gather=true needs optimizer.overlap_grad_reduce=true (Megatron's buckets); set both, "
        "or neither": optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce,
    }


def _cpu_problems(config: RunConfig) -> Problems:
    """Transformer Engine has no CPU build, so a CPU run can use nothing that Megatron builds on it."""
    optimizer = config.optimizer
    on_gpus = [
        ("optimizer.precision_aware", "true", "false", optimizer.precision_aware),
        ("optimizer.offload", f"{optimizer.offload:g}", "0", optimizer.offload > 0),
        ("train.offload_layers", str(config.train.offload_layers), "0", config.train.offload_layers > 0),
    ]
    for role, model in config.models:
        impl, recipe = model.transformer_impl, model.fp8.recipe
        on_gpus.append((f"{role}.transformer_impl", impl, "auto", impl == TRANSFORMER_ENGINE))
        on_gpus.append((f"{role}.fp8.recipe", recipe, "none", model.fp8.enabled))
        exchange = model.layout.cp_comm_type
        on_gpus.append((f"{role}.layout.cp_comm_type", exchange, "p2p", exchange != "p2p"))
    return {
        f"{name}={value} needs a GPU, but train.gpus_per_node=0 runs on CPUs; use {name}={remedy}": used
        for name, value, remedy, used in on_gpus
    }
