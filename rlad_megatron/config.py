"""The configuration of a run: one tree of frozen dataclasses, and the checks that need nothing but the tree.

Recipes are functions that return a `RunConfig`. Importing this module needs neither torch nor vLLM.
Checks that read files (tokenizers, safetensors, prompt files) are in `rlad_megatron.launch.preflight`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from rlad_megatron.errors import ConfigError

OBJECTIVES = ("trrd", "grpo", "kdrl", "on_policy_kl", "cross_entropy")
TEACHER_OBJECTIVES = ("trrd", "kdrl", "on_policy_kl")
GROUP_RELATIVE_OBJECTIVES = ("trrd", "grpo", "kdrl")


@dataclass(frozen=True)
class LayoutConfig:
    """How one model is cut over the ranks. Data parallelism takes what is left of the world."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False  # between the cut layers each tensor-parallel rank holds its share of the tokens

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True)
class Fp8Config:
    """FP8 products in the layers of a model (docs/precision.md). Embedding, head, norms and attention stay as they are.

    A teacher with a recipe keeps the weights of its layers in FP8 and nowhere else.
    """

    recipe: str = "none"  # none | delayed | tensorwise | blockwise | mxfp8
    format: str = "hybrid"  # hybrid (e4m3 forward, e5m2 for gradients) | e4m3 (both)
    amax_history_len: int = 1024  # delayed: steps whose largest value sets the scale
    amax_compute: str = "max"  # delayed: max (of the history) | most_recent
    param_gather: bool = False  # student: keep the layers' weights in FP8, and gather them as such
    first_last_layers_bf16: bool = False  # leave the first and the last layer out

    @property
    def enabled(self) -> bool:
        return self.recipe != "none"


@dataclass(frozen=True)
class ModelConfig:
    """A model to load: a Hugging Face folder, and how to hold it."""

    path: str = ""  # folder with config.json, *.safetensors and the tokenizer's files
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    precision: str = "bf16"  # bf16 | fp16 | fp32
    transformer_impl: str = "auto"  # auto | transformer_engine | local; auto: local on CPUs and in fp32
    fp8: Fp8Config = field(default_factory=Fp8Config)


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """The frozen teacher, which only scores: on the trainer's ranks, or on ranks of its own."""

    offload: bool = False  # the weights rest in the host's memory while it does not score
    ranks_per_node: int = 0  # ranks of its own on each node that has it; 0: it is on the trainer's ranks
    nodes: int = 0  # nodes of its own for those ranks; 0: they are on the trainer's nodes


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised (docs/method.md)."""

    name: str = "trrd"  # trrd | grpo | kdrl | on_policy_kl | cross_entropy
    alpha: float = 0.5  # trrd: 1 is GRPO, 0 anchors on the teacher alone
    teacher_clamp: float = 1.0  # trrd: c of eq. 3, in nats
    eps_low: float = 0.20  # clip range below 1
    eps_high: float = 0.28  # clip range above 1
    kl_coefficient: float = 2e-3  # kdrl: weight of the reverse KL to the teacher
    aggregation: str = "sequence_mean"  # sequence_mean (mean over responses of mean over tokens) | token_mean
    mismatch_correction: str = "none"  # none | truncated_is | icepop
    mismatch_cap: float = 2.0  # truncated_is: upper bound of the weight; icepop: keep within [1/cap, cap]


@dataclass(frozen=True)
class LossConfig:
    """How the loss is computed; the result is the same."""

    fused: bool = True  # straight from hidden states in chunks of tokens; false: from the logits of all of them
    memory_mb: int = 1024  # budget for the logits of a chunk


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from and how they are rendered."""

    source: str = "knights_and_knaves"  # knights_and_knaves | path of a JSONL file with "prompt" and "answer"
    eval_source: str = ""  # JSONL for evaluation; empty: the source's own held-out part
    people: tuple[int, ...] = (2,)  # knights_and_knaves: numbers of people, PPL2 .. PPL8
    depth: int = 2  # knights_and_knaves: nesting of statements
    width: int = 2  # knights_and_knaves: operands of "and" and "or"
    prompt_style: str = "chat"  # chat (the tokenizer's chat template) | plain (the text as it is)
    train_size: int = 4096  # distinct training puzzles of each number of people
    eval_size: int = 256  # distinct held-out puzzles, over all numbers of people
    reward: str = "knights_and_knaves"  # knights_and_knaves | math | module:function
    seed: int = 0


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 2048  # response tokens at most


@dataclass(frozen=True)
class RolloutConfig:
    """The vLLM servers and what is asked of them."""

    group_size: int = 8  # responses to each prompt
    prompts_per_step: int = 32
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    servers: int = 1  # servers that the run starts by itself
    nodes: int = 0  # nodes of their own for the servers; 0: they are on the trainer's nodes
    colocate: bool = False  # the servers share the GPUs of the trainer's ranks
    urls: tuple[str, ...] = ()  # servers that somebody else started; then `servers` is not used
    port: int = 8377  # first port of own servers; server i listens on port + i, on 127.0.0.1
    tensor_parallel: int = 1  # of each server
    dtype: str = "bfloat16"  # bfloat16 | float16 | float32
    weight_transfer: str = "auto"  # auto | shared_memory | nccl | ipc; auto: by devices (rollout/transfer.py)
    sleep_level: int = 2  # of colocated servers while the trainer works: 0 awake, 1 weights on the host, 2 nothing kept
    max_concurrency: int = 256  # requests in flight at each server
    gpu_memory_utilization: float = 0.9
    kv_cache_gb: float = 1.0  # CPU servers: size of the KV cache
    startup_timeout_s: float = 600.0
    request_timeout_s: float = 600.0
    max_restarts: int = 3  # of each server in a run, before the run gives up
    probe_bound: float = 0.1  # largest |log-prob difference| of the decode probe after a sync, in nats; float32: 1e-3


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with Megatron's distributed optimizer."""

    lr: float = 1e-6
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"  # constant | linear | cosine
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    precision_aware: bool = False  # Transformer Engine's Adam holds the master copy, as what bf16 lacks of float32
    moments: str = "fp32"  # fp32 | bf16 (with precision_aware)
    overlap_grad_reduce: bool = False  # reduce gradients while backward goes on
    overlap_param_gather: bool = False  # gather weights while the next update's forward goes on
    offload: float = 0.0  # share of the parameters whose state and update are on the host


@dataclass(frozen=True)
class TrainConfig:
    """The trainer."""

    steps: int = 100
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 8  # of every node, the teacher's and servers' too; 0: a run on CPUs
    gpu_memory_gb: float = 80.0  # of each GPU, in GB of 1e9 bytes; what `rlad plan` fills
    updates_per_rollout: int = 1  # optimizer updates on each batch of rollouts
    microbatch_tokens: int = 8192  # packing budget; a longer sample gets a micro-batch of its own
    recompute: str = "none"  # none | selective | full: activations that backward makes anew instead of keeping them
    max_skipped_steps: int = 3  # non-finite steps in a row before the run stops
    distributed_timeout_s: float = 1800.0
    seed: int = 0

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class SftConfig:
    """`rlad sft`: cross-entropy on traces."""

    traces: str = ""  # JSONL with "prompt" and "response"; empty: gold traces of the data source
    batch_size: int = 32  # traces of an update


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out prompts."""

    every: int = 10  # steps; 0: only before and after
    samples: int = 1  # K of Mean@K and Pass@K
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.6, top_p=0.95))
    teacher: bool = False  # also evaluate the teacher, once, before training


@dataclass(frozen=True)
class CheckpointConfig:
    """Megatron distributed checkpoints in the run folder."""

    every: int = 50  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints kept
    export_hf: bool = True  # write the student in Hugging Face format at the end
    export_precision: str = "bf16"  # bf16 | fp32


@dataclass(frozen=True)
class ObserveConfig:
    """What a run leaves behind to look at."""

    tensorboard: bool = True
    wandb_project: str = ""  # empty: no W&B
    rollouts_per_step: int = 8  # rollouts written to rollouts/ each step


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; resolved and saved as `config.yaml` in the run folder."""

    name: str = "run"
    runs_dir: str = "runs"
    models_dir: str = "models"  # recipes name model folders in it as ${models_dir}/NAME
    resume: bool = False
    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def generates(self) -> bool:
        """Whether the run samples from rollout servers; fine-tuning on traces does not."""
        return self.objective.name != "cross_entropy"

    @property
    def needs_teacher(self) -> bool:
        return self.objective.name in TEACHER_OBJECTIVES

    @property
    def teacher_apart(self) -> bool:
        """Whether the teacher has ranks of its own, in a world of their own."""
        return self.needs_teacher and self.teacher.ranks_per_node > 0

    @property
    def teacher_world_size(self) -> int:
        """Ranks that hold the teacher: its own, or the trainer's."""
        if not self.teacher_apart:
            return self.train.world_size
        return (self.teacher.nodes or self.train.nodes) * self.teacher.ranks_per_node


PRECISIONS = ("bf16", "fp16", "fp32")
EXPORT_PRECISIONS = ("bf16", "fp32")
ENGINE = "transformer_engine"
TRANSFORMER_IMPLS = ("auto", ENGINE, "local")
FP8_RECIPES = ("none", "delayed", "tensorwise", "blockwise", "mxfp8")
FP8_FORMATS = ("hybrid", "e4m3")
AMAX_COMPUTES = ("max", "most_recent")
MOMENTS = ("fp32", "bf16")
RECOMPUTES = ("none", "selective", "full")
AGGREGATIONS = ("sequence_mean", "token_mean")
MISMATCH_CORRECTIONS = ("none", "truncated_is", "icepop")
DECAYS = ("constant", "linear", "cosine")
DTYPES = ("bfloat16", "float16", "float32")
PROMPT_STYLES = ("chat", "plain")
WEIGHT_TRANSFERS = ("auto", "shared_memory", "nccl", "ipc")


def validate(config: RunConfig) -> None:
    """Check every field by itself and against the others.

    Raises:
        ConfigError: naming the field, its value and the remedy.
    """
    _validate_choices(config)
    _validate_ranges(config)
    _validate_models(config)
    for role, model in _models(config):
        _validate_precision(role, model)
    _validate_student_precision(config)
    _validate_teacher_precision(config)
    _validate_teacher_ranks(config)
    _validate_optimizer(config)
    if not config.train.gpus_per_node:
        _validate_cpu_run(config)
    _validate_placement(config)
    _validate_together(config)


def _models(config: RunConfig) -> list[tuple[str, ModelConfig]]:
    """The models of a run by their fields' names; the teacher only where there is one."""
    teacher = [("teacher", config.teacher)] if config.needs_teacher or config.eval.teacher else []
    return [("student", config.student), *teacher]


def _validate_choices(config: RunConfig) -> None:
    _choice("objective.name", config.objective.name, OBJECTIVES)
    _choice("objective.aggregation", config.objective.aggregation, AGGREGATIONS)
    _choice("objective.mismatch_correction", config.objective.mismatch_correction, MISMATCH_CORRECTIONS)
    _choice("optimizer.decay", config.optimizer.decay, DECAYS)
    _choice("rollout.dtype", config.rollout.dtype, DTYPES)
    _choice("rollout.weight_transfer", config.rollout.weight_transfer, WEIGHT_TRANSFERS)
    _choice("data.prompt_style", config.data.prompt_style, PROMPT_STYLES)
    _choice("checkpoint.export_precision", config.checkpoint.export_precision, EXPORT_PRECISIONS)
    _choice("optimizer.moments", config.optimizer.moments, MOMENTS)
    _choice("train.recompute", config.train.recompute, RECOMPUTES)
    for role, model in _models(config):
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


def _validate_ranges(config: RunConfig) -> None:
    _within("objective.alpha", config.objective.alpha, 0.0, 1.0)
    _within("objective.eps_low", config.objective.eps_low, 0.0, 1.0)
    _within("rollout.sampling.top_p", config.rollout.sampling.top_p, 0.0, 1.0)
    _within("eval.sampling.top_p", config.eval.sampling.top_p, 0.0, 1.0)
    _within("rollout.gpu_memory_utilization", config.rollout.gpu_memory_utilization, 0.0, 1.0)
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
        if not (value > 0 and math.isfinite(value)):
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
        ("observe.rollouts_per_step", config.observe.rollouts_per_step),
    ):
        if not value >= 0:
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
    if config.objective.mismatch_cap < 1:
        raise ConfigError(f"objective.mismatch_cap={config.objective.mismatch_cap} must be at least 1")
    if any(not 2 <= people <= 8 for people in config.data.people):
        raise ConfigError(f"data.people={list(config.data.people)} must be numbers from 2 to 8")
    if not config.name or "/" in config.name or config.name in (".", ".."):
        raise ConfigError(f"name={config.name!r} must be a folder name; runs_dir says where the folder goes")


def _validate_models(config: RunConfig) -> None:
    trainers = "train.nodes * train.ranks_per_node"
    own = f"{'teacher' if config.teacher.nodes else 'train'}.nodes * teacher.ranks_per_node"
    worlds = {
        "student": (config.train.world_size, trainers),
        "teacher": (config.teacher_world_size, own if config.teacher_apart else trainers),
    }
    for role, model in _models(config):
        _validate_layout(role, model, *worlds[role])
    if not config.student.path:
        raise ConfigError("student.path is empty; give a folder in Hugging Face format")
    if (config.needs_teacher or config.eval.teacher) and not config.teacher.path:
        why = f"objective.name={config.objective.name}" if config.needs_teacher else "eval.teacher=true"
        raise ConfigError(
            f"teacher.path is empty, but {why} needs a teacher; give a folder in Hugging Face format, "
            "or use objective.name=grpo and eval.teacher=false"
        )


def _validate_precision(role: str, model: ModelConfig) -> None:
    """What goes together in any model. What it asks of the device: models/precision.py."""
    fp8, defaults = model.fp8, Fp8Config()
    if model.precision == "fp32" and model.transformer_impl == ENGINE:
        raise ConfigError(
            f"{role}.precision=fp32 with {role}.transformer_impl={ENGINE}: its fused attention knows no float32; "
            "use transformer_impl=auto, or precision=bf16"
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


def _validate_student_precision(config: RunConfig) -> None:
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


def _validate_teacher_precision(config: RunConfig) -> None:
    if len(_models(config)) == 1:
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


def _validate_teacher_ranks(config: RunConfig) -> None:
    """A teacher on ranks of its own. Whether they find GPUs: `_validate_placement`."""
    teacher, train, rollout = config.teacher, config.train, config.rollout
    if teacher.nodes and not teacher.ranks_per_node:
        raise ConfigError(
            f"teacher.nodes={teacher.nodes} without ranks on them: teacher.ranks_per_node=0 puts the teacher on the "
            "trainer's ranks; set teacher.ranks_per_node, or use teacher.nodes=0"
        )
    if not teacher.ranks_per_node:
        return
    if not config.needs_teacher:
        raise ConfigError(
            f"teacher.ranks_per_node={teacher.ranks_per_node}, but objective.name={config.objective.name} asks no "
            "teacher; use teacher.ranks_per_node=0 and teacher.nodes=0"
        )
    if teacher.offload:
        raise ConfigError(
            "teacher.offload=true makes room for the trainer, but with "
            f"teacher.ranks_per_node={teacher.ranks_per_node} the teacher has ranks of its own; use one of the two"
        )
    if config.eval.teacher and train.gpus_per_node:
        raise ConfigError(
            f"eval.teacher=true serves the teacher before the run, on GPUs that its ranks (teacher.ranks_per_node="
            f"{teacher.ranks_per_node}) may hold; use eval.teacher=false, and `rlad evaluate` for the teacher"
        )
    if train.distributed_timeout_s <= rollout.request_timeout_s:
        raise ConfigError(
            f"train.distributed_timeout_s={train.distributed_timeout_s:g} must exceed rollout.request_timeout_s="
            f"{rollout.request_timeout_s:g}: the other ranks wait while rank 0 asks the teacher"
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
        for role, model in _models(config)
        for name, value, remedy in (
            ("fp8.recipe", model.fp8.recipe if model.fp8.enabled else "", "none"),
            ("transformer_impl", model.transformer_impl if model.transformer_impl == ENGINE else "", "auto"),
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


def _validate_placement(config: RunConfig) -> None:
    """Ranks and servers must find a GPU each, unless they share on purpose. On CPUs there is nothing to share out."""
    train, rollout, teacher = config.train, config.rollout, config.teacher
    if rollout.colocate and rollout.nodes:
        raise ConfigError(
            f"rollout.colocate=true puts the servers on the trainer's GPUs, but rollout.nodes={rollout.nodes} gives "
            "them nodes of their own; use one of the two"
        )
    _validate_transfer(config)
    if not train.gpus_per_node:
        return
    if train.ranks_per_node > train.gpus_per_node:
        raise ConfigError(
            f"train.ranks_per_node={train.ranks_per_node} exceeds train.gpus_per_node={train.gpus_per_node}: each rank "
            "needs a GPU of its own; use more train.nodes"
        )
    left = train.gpus_per_node if teacher.nodes else train.gpus_per_node - train.ranks_per_node
    if config.teacher_apart and teacher.ranks_per_node > left:
        where = "a node of its own" if teacher.nodes else "each of the trainer's nodes"
        raise ConfigError(
            f"teacher.ranks_per_node={teacher.ranks_per_node} exceeds the {left} GPUs that {where} has for them "
            f"(train.gpus_per_node={train.gpus_per_node}, train.ranks_per_node={train.ranks_per_node}); use "
            + ("more teacher.nodes" if teacher.nodes else "teacher.nodes")
        )
    if rollout.urls or config.objective.name == "cross_entropy":
        return  # no servers of our own
    tensor_parallel = rollout.tensor_parallel
    if rollout.nodes:
        where = f"rollout.nodes={rollout.nodes} of {train.gpus_per_node} GPUs"
        gpus, nodes, remedy = train.gpus_per_node, rollout.nodes, "more rollout.nodes"
    elif rollout.colocate:
        where = f"the trainer's {train.world_size} GPUs (rollout.colocate=true)"
        gpus, nodes, remedy = train.ranks_per_node, train.nodes, "rollout.nodes and rollout.colocate=false"
    else:
        beside = teacher.ranks_per_node if config.teacher_apart and not teacher.nodes else 0
        gpus, nodes = train.gpus_per_node - train.ranks_per_node - beside, train.nodes
        where = f"the {gpus * nodes} GPUs that the ranks leave on the trainer's nodes, and two tasks would share one"
        remedy = "rollout.colocate=true to share on purpose, or rollout.nodes"
    # A server stays within a node.
    if rollout.servers > gpus // tensor_parallel * nodes:
        raise ConfigError(
            f"rollout.servers={rollout.servers} of rollout.tensor_parallel={tensor_parallel} do not fit on {where}; "
            f"use fewer servers, {remedy}"
        )


def _validate_transfer(config: RunConfig) -> None:
    """NCCL joins different GPUs and CUDA IPC the same ones; neither exists on CPUs."""
    rollout = config.rollout
    if rollout.colocate and rollout.urls:
        raise ConfigError(
            "rollout.colocate=true puts the run's own servers on the trainer's GPUs, but rollout.urls names others; "
            "use one of the two"
        )
    if rollout.weight_transfer in ("nccl", "ipc") and not config.train.gpus_per_node:
        raise ConfigError(
            f"rollout.weight_transfer={rollout.weight_transfer} moves weights between GPUs, but train.gpus_per_node=0 "
            "is a run on CPUs; use rollout.weight_transfer=auto"
        )
    if rollout.weight_transfer == "nccl" and rollout.colocate:
        raise ConfigError(
            "rollout.weight_transfer=nccl cannot join two processes on one GPU, and rollout.colocate=true shares them; "
            "use rollout.weight_transfer=auto"
        )
    if rollout.weight_transfer == "ipc" and not rollout.colocate:
        raise ConfigError(
            "rollout.weight_transfer=ipc reaches servers on the trainer's own GPUs alone; use rollout.colocate=true, "
            "or rollout.weight_transfer=auto"
        )


def _validate_together(config: RunConfig) -> None:
    if config.objective.name in GROUP_RELATIVE_OBJECTIVES and config.rollout.group_size == 1:
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
    if not (math.isfinite(value) and low <= value <= high):
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
            f"does not divide the {world_size} ranks ({product})"
        )
