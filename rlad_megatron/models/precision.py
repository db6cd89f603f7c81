"""What precisions require of devices, shapes and sequence lengths. Torch-free; touches no device.

Sources: Transformer Engine (`transformer_engine/pytorch/quantization.py`: support of each recipe; `utils.py`:
dimensions of an FP8 product) and Megatron-Core (`fp8_utils.py`: version of each recipe, alignment).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlad_megatron.config import TRANSFORMER_ENGINE, Fp8Config, ModelConfig, RunConfig, TeacherConfig
from rlad_megatron.config.messages import shown
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.spec import ModelSpec

Version = tuple[int, int]

TOKEN_MULTIPLE = 16
BLOCK = 128  # values that share a scale in the blockwise recipe
BF16_CAPABILITY = (8, 0)
# The Transformer Engine that first exchanges packed sequences in this way (context_parallel.py: earlier ones refuse
# qkv_format "thd").
CP_TRANSFORMER_ENGINE = {"p2p": (2, 0), "a2a": (2, 10), "all_gather": (2, 18)}
# The Transformer Engine with which Megatron-Core first recomputes activation functions and norms between FP8 products.
RECOMPUTE_TRANSFORMER_ENGINE = (2, 6)
# The Transformer Engine whose Adam first stores the 16 bits that bf16 lacks instead of a float32 copy, or bf16 moments.
REMAINDERS_TRANSFORMER_ENGINE, BF16_MOMENTS_TRANSFORMER_ENGINE = (2, 1), (2, 3)


@dataclass(frozen=True)
class DeviceFacts:
    """The hardware and software of a rank. None: not present."""

    capability: Version | None  # of the GPU
    cuda: Version | None  # that torch was built with
    engine: Version | None  # of Transformer Engine


@dataclass(frozen=True)
class Needs:
    """What a recipe runs on, and the multiple that its products need of every dimension."""

    capability: Version
    engine: Version
    cuda: Version
    multiple: int = TOKEN_MULTIPLE
    below: Version = (99, 0)  # the first capability that is not supported
    # Newer GPUs need a newer Transformer Engine: (first such capability, version).
    newer: tuple[Version, Version] | None = None


NEEDS = {
    "delayed": Needs(capability=(8, 9), engine=(2, 0), cuda=(12, 1)),
    "tensorwise": Needs(capability=(8, 9), engine=(2, 2), cuda=(12, 1)),
    "blockwise": Needs(capability=(9, 0), engine=(2, 3), cuda=(12, 9), newer=((10, 0), (2, 9))),
    "mxfp8": Needs(capability=(10, 0), engine=(2, 1), cuda=(12, 8), multiple=32, below=(12, 0)),
}


def check_device(config: RunConfig, device: DeviceFacts) -> None:
    """Raise ConfigError if this device cannot run the configuration; the message names what it can run."""
    _check_model("student", config.student, device)
    if config.needs_teacher:
        _check_model("teacher", config.teacher, device)
    between = [module for module in config.train.recompute_modules if module in ("moe_act", "layernorm")]
    if between and config.student.fp8.enabled:
        least = RECOMPUTE_TRANSFORMER_ENGINE
        if missing := _lacking_engine(device, f"Transformer Engine {_text(least)}", least):
            raise ConfigError(
                f"train.recompute_modules={shown(between)} with student.fp8.recipe={config.student.fp8.recipe} needs "
                f"{missing}; use train.recompute_modules=[moe], or fp8.recipe=none"
            )
    # Without optimizer.offload: config.validate allows it only with precision_aware.
    optimizer = config.optimizer
    for asked, field, value, off, least in (
        (optimizer.precision_aware, "precision_aware", "true", "false", REMAINDERS_TRANSFORMER_ENGINE),
        (optimizer.moments == "bf16", "moments", "bf16", "fp32", BF16_MOMENTS_TRANSFORMER_ENGINE),
    ):
        missing = _lacking_engine(device, f"the Adam of Transformer Engine {_text(least)}", least)
        if asked and missing:
            raise ConfigError(f"optimizer.{field}={value} needs {missing}; use optimizer.{field}={off}")


def _lacking_engine(device: DeviceFacts, what: str, least: Version) -> str:
    """`what`, which Transformer Engine `least` brings, if the device lacks it, and why; otherwise empty."""
    if device.capability is None:
        return "a GPU"
    if device.engine is None:
        return "Transformer Engine, which is not installed"
    return f"{what}, and {_text(device.engine)} is installed" if device.engine < least else ""


def _check_model(role: str, model: ModelConfig, device: DeviceFacts) -> None:
    engine = model.transformer_impl == TRANSFORMER_ENGINE or model.fp8.enabled
    if device.capability is None:
        if engine:
            field = f"fp8.recipe={model.fp8.recipe}" if model.fp8.enabled else f"transformer_impl={TRANSFORMER_ENGINE}"
            raise ConfigError(
                f"{role}.{field} needs a GPU, and there is none here; use fp8.recipe=none and transformer_impl=auto"
            )
        return
    if device.engine is None and uses_transformer_engine(model, gpu=True):
        raise ConfigError(
            f"{role}.transformer_impl={model.transformer_impl} needs Transformer Engine, which is not installed; "
            "install it, or use transformer_impl=local and fp8.recipe=none"
        )
    exchange, engine_of = model.layout.cp_comm_type, CP_TRANSFORMER_ENGINE
    if model.layout.context_parallel > 1 and device.engine and device.engine < engine_of[exchange]:
        usable = [name for name, least in engine_of.items() if least <= device.engine]
        raise ConfigError(
            f"{role}.layout.cp_comm_type={exchange} needs Transformer Engine {_text(engine_of[exchange])} for packed "
            f"sequences, and {_text(device.engine)} is installed; use {' or '.join(usable) or 'context_parallel=1'}"
        )
    if model.precision == "bf16" and device.capability < BF16_CAPABILITY:
        raise ConfigError(
            f"{role}.precision=bf16 needs compute capability 8.0, and this GPU has {_text(device.capability)}; "
            "use fp16 or fp32"
        )
    if model.fp8.enabled:
        lacking = _lacking(model.fp8.recipe, device)
        if lacking:
            usable = [name for name in usable_recipes(device) if not (role == "teacher" and name == "delayed")]
            raise ConfigError(
                f"{role}.fp8.recipe={model.fp8.recipe} needs {lacking}; what works here: {', '.join([*usable, 'none'])}"
            )


def usable_recipes(device: DeviceFacts) -> list[str]:
    """The FP8 recipes that run on the device."""
    return [recipe for recipe in NEEDS if not _lacking(recipe, device)]


def needs_in_words(recipe: str) -> str:
    """The GPU and the software that an FP8 recipe runs on."""
    needs = NEEDS[recipe]
    text = f"compute capability {_capabilities(needs)}, Transformer Engine {_text(needs.engine)}"
    if needs.newer:
        text += f" ({_text(needs.newer[1])} from capability {_text(needs.newer[0])} on)"
    return f"{text}, torch for CUDA {_text(needs.cuda)}"


def _capabilities(needs: Needs) -> str:
    below = f" and below {_text(needs.below)}" if needs.below < (99, 0) else ""
    return f"{_text(needs.capability)} or higher{below}"


def _lacking(recipe: str, device: DeviceFacts) -> str:
    """What the device lacks for a recipe, in a few words; empty if nothing."""
    needs = NEEDS[recipe]
    capability = device.capability
    if capability is not None and not needs.capability <= capability < needs.below:
        return f"compute capability {_capabilities(needs)}, and this GPU has {_text(capability)}"
    engine = needs.engine
    if needs.newer and capability is not None and capability >= needs.newer[0]:
        engine = needs.newer[1]
    missing = _lacking_engine(device, f"Transformer Engine {_text(engine)} on this GPU", engine)
    if missing:
        return missing
    if device.cuda is None or device.cuda < needs.cuda:
        found = _text(device.cuda) if device.cuda else "none"
        return f"torch for CUDA {_text(needs.cuda)}, and it is built for {found}"
    return ""


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def uses_transformer_engine(model: ModelConfig, *, gpu: bool) -> bool:
    """Whether the layers are Transformer Engine's. Not in float32: its fused attention does not support it."""
    return model.transformer_impl == TRANSFORMER_ENGINE or (
        model.transformer_impl == "auto" and gpu and model.precision != "fp32"
    )


def token_multiple(model: ModelConfig) -> int:
    """The length of a micro-batch is a multiple of this, so that each rank's share fills whole tiles of FP8 products.

    16 tokens for each tensor- and context-parallel rank, 32 with MXFP8. Padding carries no loss (data/packing.py).
    """
    sharers = model.layout.tensor_parallel * model.layout.context_parallel
    if _gathers_blocks(model):
        return BLOCK * sharers
    return sharers * (NEEDS[model.fp8.recipe].multiple if model.fp8.enabled else TOKEN_MULTIPLE)


def _gathers_blocks(model: ModelConfig) -> bool:
    """Whether ranks gather tokens in FP8 blocks of 128, so that each rank's share must be a multiple of 128.

    Transformer Engine 2.8 to 2.13 refuses other shares ("All-gather requires quantizable tensor"); earlier and later
    versions gather them in bf16.
    """
    return model.fp8.recipe == "blockwise" and model.layout.sequence_parallel


def fp8_warmup_passes(model: ModelConfig) -> int:
    """Forward and backward passes, with dropped gradients, that a student needs before its gradients are right.

    Delayed scaling starts with scales of 1, and each backward pass sets the next one's scales from what it has seen. At
    scale 1 the gradients of long responses are zero in FP8. The first pass sees the gradients on the residual stream:
    those of the outputs of attention and feed-forward. With their scales known, the second pass reaches the products
    before them, and the third sees what all of them add to the stream.
    """
    return 3 if model.fp8.recipe == "delayed" else 0


def check_fp8_shape(role: str, model: ModelConfig, spec: ModelSpec) -> None:
    """Raise ConfigError if a layer's weight, as cut over the ranks, does not fit the recipe's tiles."""
    if not model.fp8.enabled:
        return
    multiple, tp = NEEDS[model.fp8.recipe].multiple, model.layout.tensor_parallel
    if _gathers_blocks(model) and spec.hidden_size % BLOCK:
        raise ConfigError(
            f"{role}.fp8.recipe=blockwise with {role}.layout.sequence_parallel=true needs multiples of {BLOCK}, and "
            f"the hidden size is {spec.hidden_size}; use {role}.layout.sequence_parallel=false, or another recipe"
        )
    ffn = spec.expert_ffn_size // model.layout.experts_tensor_parallel if spec.num_experts else spec.ffn_size // tp
    nets = 2 * spec.size("gdn_key") + 2 * spec.size("gdn_value") + 2 * spec.gdn_value_heads
    for what, size in (
        ("hidden size", spec.hidden_size),
        ("query heads on a rank", spec.size("query") // tp),
        ("query, key and value on a rank", (spec.size("query") + 2 * spec.size("kv")) // tp),
        ("feed-forward width on a rank", ffn),
        ("width of the shared expert on a rank", spec.shared_expert_ffn_size // tp),
        ("projection of a gated delta net on a rank", nets // tp),
        ("value heads of a gated delta net on a rank", spec.size("gdn_value") // tp),
    ):
        if size % multiple:
            remedy = f"fewer {role}.layout.tensor_parallel than {tp}, or " if tp > 1 else ""
            raise ConfigError(
                f"{role}.fp8.recipe={model.fp8.recipe} needs multiples of {multiple}, and the {what} is {size}; "
                f"use {remedy}{role}.fp8.recipe=none"
            )


def reference_of(teacher: TeacherConfig) -> TeacherConfig | None:
    """The teacher to compare its precision with: bf16 for FP8, otherwise float32; None for float32 itself."""
    if teacher.fp8.enabled:
        return replace(teacher, fp8=Fp8Config())
    if teacher.precision == "fp32":
        return None
    return replace(teacher, precision="fp32", transformer_impl="local")


def precision_of(model: ModelConfig) -> str:
    """The precision in words."""
    return (
        f"{model.precision} with FP8 ({model.fp8.recipe}, {model.fp8.format})" if model.fp8.enabled else model.precision
    )
