"""The plan of a run: what each GPU holds, and whether it fits. Needs only the configuration (`rlad plan`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from rlad_megatron.config import LossConfig, ModelConfig, OptimizerConfig, RunConfig
from rlad_megatron.config.placement import has_servers, stage_of
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.config_json import read_or_known_spec
from rlad_megatron.models.precision import check_fp8_shape, token_multiple, uses_transformer_engine
from rlad_megatron.models.shard_plan import check_layout, check_server_layout, check_student_layout, check_vocabularies
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.loss_memory import loss_bytes, pick_chunk_tokens
from rlad_megatron.plan import memory
from rlad_megatron.plan.memory import Model

EXACT, ESTIMATED = "exact", "estimated"
PROMPT_TOKENS = 1024  # assumed length of the longest prompt, capped by the response: prompts are not read here
RESERVE_GB = 4.0  # CUDA context, NCCL's buffers, kernels' work space, fragmentation
SERVER_RESERVE_GB = 4.0  # the same plus vLLM's CUDA graphs and the activations of a prefill


@dataclass(frozen=True)
class Item:
    """One line of a GPU's memory."""

    name: str
    size: int  # bytes
    how: str  # exact | estimated
    why: str  # what it is made of
    phase: str = ""  # "" is always held; "update" and "teacher" exclude each other


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank of the trainer or of a dedicated teacher; stands for all ranks that hold the same."""

    rank: int  # the first of them, in its world
    student_stage: int | None  # None on a dedicated teacher's ranks
    teacher_stage: int | None
    items: tuple[Item, ...]

    @property
    def resting(self) -> int:
        """Bytes held while servers generate."""
        return sum(item.size for item in self.items if not item.phase)

    @property
    def size(self) -> int:
        """Peak bytes."""
        phases = {
            phase: sum(item.size for item in self.items if item.phase == phase) for phase in ("update", "teacher")
        }
        return self.resting + max(phases.values())


@dataclass(frozen=True)
class ServerMemory:
    """The memory of one GPU of a server."""

    items: tuple[Item, ...]
    limit: int  # bytes of the GPU that the server may take; on CPUs the bytes it takes
    kv_tokens: int  # tokens that the KV cache holds
    longest: int  # tokens of the longest request

    @property
    def responses(self) -> int:
        """How many of the longest requests fit at the same time."""
        return self.kv_tokens // self.longest


@dataclass(frozen=True)
class Plan:
    """What a run needs and what it has."""

    config: RunConfig
    student: Model
    teacher: Model | None
    longest: int  # tokens of the longest sample; a micro-batch holds at least as many
    tokens: int  # of the longest micro-batch
    ranks: tuple[RankMemory, ...]  # the trainer's, one of each kind
    teacher_ranks: tuple[RankMemory, ...]  # a dedicated teacher's, one of each kind
    server: ServerMemory | None

    @cached_property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.size)

    @cached_property
    def fullest_teacher(self) -> RankMemory:
        return max(self.teacher_ranks, key=lambda rank: rank.size)

    @property
    def teacher_shortage(self) -> str:
        """Why a dedicated teacher's rank does not fit on its GPU, in a few words; empty if it does."""
        size = self.config.train.gpu_memory_gb
        if not self.teacher_ranks or not self.config.train.gpus_per_node or self.fullest_teacher.size <= size * 1e9:
            return ""
        return (
            f"teacher rank {self.fullest_teacher.rank} needs {gb(self.fullest_teacher.size)} GB and has {size:.1f} GB "
            f"(train.gpu_memory_gb={size:g})"
        )

    @property
    def resting_limit(self) -> int | None:
        """Bytes that a rank may hold while a server generates on its GPU; None if no server shares it."""
        config = self.config
        if not (config.train.gpus_per_node and config.rollout.colocate and self.server):
            return None
        return int(config.train.gpu_memory_gb * 1e9) - self.server.limit

    @property
    def trainer_limit(self) -> int | None:
        """Bytes that a rank may take while it works; None on CPUs, where nothing is refused."""
        config = self.config
        if not config.train.gpus_per_node:
            return None
        if self.resting_limit is None:
            return int(config.train.gpu_memory_gb * 1e9)
        if not config.rollout.sleep_level:
            return self.resting_limit
        # A sleeping server frees weights and cache; its CUDA context and graphs stay.
        return int((config.train.gpu_memory_gb - SERVER_RESERVE_GB) * 1e9)

    @property
    def trainer_shortage(self) -> str:
        """Why a rank does not fit on its GPU, in a few words; empty if it does."""
        rollout, at_rest = self.config.rollout, max(self.ranks, key=lambda rank: rank.resting)
        asleep = " next to a sleeping server" if rollout.sleep_level else " next to a server that stays awake"
        awake = f" next to a server with rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}"
        return self._lack(
            self.fullest, self.fullest.size, self.trainer_limit, asleep if self.resting_limit is not None else ""
        ) or self._lack(at_rest, at_rest.resting, self.resting_limit, f"{awake} while it generates")

    def _lack(self, rank: RankMemory, size: int, limit: int | None, where: str) -> str:
        if limit is None or size <= limit:
            return ""
        # At rest no item of a phase is held, so none of them is the reason.
        items = rank.items if size > rank.resting else [item for item in rank.items if not item.phase]
        largest = max(items, key=lambda item: item.size)
        return (
            f"rank {rank.rank} needs {gb(size)} GB ({largest.name} {gb(largest.size)}) and has {gb(limit)} GB"
            f"{where} (train.gpu_memory_gb={self.config.train.gpu_memory_gb:g})"
        )

    @property
    def server_shortage(self) -> str:
        """Why a server does not fit, in a few words; empty if it does."""
        if self.server is None or not self.config.train.gpus_per_node or self.server.responses:
            return ""
        return (
            f"a server's KV cache would hold {self.server.kv_tokens} tokens, fewer than the {self.server.longest} of "
            f"one prompt and response (rollout.tensor_parallel={self.config.rollout.tensor_parallel})"
        )

    @property
    def shortage(self) -> str:
        return self.trainer_shortage or self.teacher_shortage or self.server_shortage


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def make_plan(config: RunConfig) -> Plan:
    """Count everything. The configuration must have passed `config.validate`.

    Raises:
        ConfigError: a model of unknown sizes, a layout that does not divide it, or responses longer than its positions.
        CheckpointError: a damaged config.json.
    """
    student = read_or_known_spec(config.student.path, "student")
    teacher = read_or_known_spec(config.teacher.path, "teacher") if config.needs_teacher else None
    return plan_models(config, student, teacher)


def plan_models(config: RunConfig, student_spec: ModelSpec, teacher_spec: ModelSpec | None) -> Plan:
    """`make_plan` for models whose specs are known."""
    student = _model("student", config.student, student_spec)
    teacher = _model("teacher", config.teacher, teacher_spec) if teacher_spec is not None else None
    if teacher is not None:
        check_vocabularies(student.spec, teacher.spec)
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            _check_positions(config, role, model)
    longest = 0  # traces are not read here
    if config.objective.name != "cross_entropy":
        longest = _with_prompt(config.rollout.sampling.max_tokens, student)
    multiple = math.lcm(token_multiple(config.student), token_multiple(config.teacher) if teacher else 1)
    tokens = memory.round_up(max(config.train.microbatch_tokens, longest), multiple)
    server = _server_memory(config, student) if has_servers(config) else None
    ranks = _rank_kinds(config, student, None if config.teacher_is_dedicated else teacher, tokens)
    teacher_ranks = _teacher_rank_kinds(config, teacher, tokens) if teacher and config.teacher_is_dedicated else ()
    return Plan(config, student, teacher, longest, tokens, ranks, teacher_ranks, server)


def _model(role: str, model: ModelConfig, spec: ModelSpec) -> Model:
    try:
        check_layout(spec, model.layout)
    except ConfigError as error:
        raise ConfigError(f"{role}.{error}") from None
    if role == "student":
        check_student_layout(spec, model.layout)
    check_fp8_shape(role, model, spec)
    return Model(spec, model.layout, model.precision, model.fp8)


def _check_positions(config: RunConfig, role: str, model: Model) -> None:
    response, room = config.rollout.sampling.max_tokens, model.spec.max_position_embeddings
    if response >= room and config.objective.name != "cross_entropy":
        raise ConfigError(
            f"rollout.sampling.max_tokens={response} and a prompt exceed the {room} positions of the {role}; lower it"
        )


def _with_prompt(response: int, model: Model) -> int:
    """Tokens of the longest sequence: a response and the assumed prompt, capped by the model's positions."""
    return min(response + min(response, PROMPT_TOKENS), model.spec.max_position_embeddings)


def _rank_kinds(config: RunConfig, student: Model, teacher: Model | None, tokens: int) -> tuple[RankMemory, ...]:
    """One rank for each pair of stages in the student's and the teacher's pipelines."""
    on_gpus = config.train.gpus_per_node > 0
    world = config.train.world_size
    kinds: dict[tuple[int, int | None], int] = {}
    stages = math.lcm(student.layout.pipeline_parallel, teacher.layout.pipeline_parallel if teacher else 1)
    for rank in range(0, world, world // stages):  # the first rank of a stage of either
        stage = stage_of(rank, student.layout, world)
        kinds.setdefault((stage, stage_of(rank, teacher.layout, world) if teacher else None), rank)
    ranks = []
    for (student_stage, teacher_stage), rank in kinds.items():
        data_parallel = world // student.layout.model_ranks
        items = _student_items(
            student,
            student_stage,
            data_parallel,
            tokens,
            attention(config, config.student),
            config.loss,
            config.optimizer,
            config.train.recompute,
        )
        if teacher is not None:
            items += _teacher_items(teacher, teacher_stage, tokens, config.loss, config.teacher.offload)
        if on_gpus:
            items += (_reserve(RESERVE_GB),)
        ranks.append(RankMemory(rank, student_stage, teacher_stage, items))
    return tuple(ranks)


def _teacher_rank_kinds(config: RunConfig, teacher: Model, tokens: int) -> tuple[RankMemory, ...]:
    """One rank for each stage of a dedicated teacher's pipeline."""
    reserve = (_reserve(RESERVE_GB),) if config.train.gpus_per_node else ()
    each = config.teacher_world_size // teacher.layout.pipeline_parallel
    return tuple(
        RankMemory(stage * each, None, stage, _teacher_items(teacher, stage, tokens, config.loss, False) + reserve)
        for stage in range(teacher.layout.pipeline_parallel)
    )


def attention(config: RunConfig, model: ModelConfig) -> str:
    """The model's kind of layers: fused (Transformer Engine's) or local."""
    return "fused" if uses_transformer_engine(model, gpu=config.train.gpus_per_node > 0) else "local"


@lru_cache(maxsize=4096)  # the search for a fitting layout asks repeatedly
def _student_items(
    model: Model,
    stage: int,
    data_parallel: int,
    tokens: int,
    attention: str,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    recompute: str,
) -> tuple[Item, ...]:
    b, layout = model.element_bytes, model.layout
    where = f"{model.layers(stage)} layers of stage {stage}"
    in_flight = layout.pipeline_parallel - stage
    precise = EXACT if not model.fp8.param_gather else ESTIMATED
    held = f"{where}, {b} bytes each"
    if model.fp8.param_gather:
        held += f"; layers in FP8 ({model.fp8.recipe}), as rows and as columns"
    items = [
        Item("student weights", memory.weight_bytes(model, stage, data_parallel), precise, held),
        Item("student gradients", memory.gradient_bytes(model, stage, data_parallel), EXACT, "float32"),
        Item(
            "student optimizer",
            memory.optimizer_bytes(model, stage, data_parallel, optimizer),
            EXACT if not (optimizer.precision_aware or model.fp8.param_gather) else ESTIMATED,
            _optimizer_why(model, optimizer, data_parallel),
        ),
        Item(
            "largest gradient",
            memory.largest_gradient_bytes(model, stage),
            ESTIMATED,
            "before it is accumulated",
            "update",
        ),
        Item(
            "activations",
            memory.activation_bytes(model, stage, tokens, attention=attention, recompute=recompute),
            ESTIMATED,
            f"{tokens} tokens, {in_flight} micro-batch{'es' * (in_flight > 1)}, {attention} layers, "
            f"{'no' if recompute == 'none' else recompute} recompute",
            "update",
        ),
    ]
    copies = memory.fp8_copy_bytes(model, stage)
    if copies:
        items.append(Item("FP8 copies", copies, ESTIMATED, "of the layers' weights, as rows and as columns", "update"))
    if model.is_last(stage):
        items.append(
            Item(
                "loss",
                _loss_bytes(model, tokens, loss, gradients=True),
                ESTIMATED,
                _loss_parts(model, tokens, loss),
                "update",
            )
        )
    return tuple(items)


def _optimizer_why(model: Model, optimizer: OptimizerConfig, data_parallel: int) -> str:
    master = {0: "", 2: "2 bytes of a master copy and ", 4: "master copy and "}[memory.master_bytes(model, optimizer)]
    moments = "float32" if optimizer.moments == "fp32" else optimizer.moments
    why = f"{master}two moments in {moments}, cut over DP {data_parallel}"
    return why + (f", {optimizer.offload:.0%} of it on the host" if optimizer.offload else "")


@lru_cache(maxsize=4096)
def _teacher_items(model: Model, stage: int, tokens: int, loss: LossConfig, offload: bool) -> tuple[Item, ...]:
    work = memory.forward_bytes(model, tokens)
    if model.is_last(stage):
        work += _loss_bytes(model, tokens, loss, gradients=False)
    fp8 = f"products' weights in FP8 ({model.fp8.recipe}), else " if model.fp8.enabled else ""
    layers = f"{model.layers(stage)} layers of stage {stage}, {fp8}{model.element_bytes} bytes each, frozen"
    layers += "; on the host but for its pass" * offload
    precise = ESTIMATED if model.fp8.enabled else EXACT
    return (
        Item("teacher weights", memory.frozen_weight_bytes(model, stage), precise, layers, "teacher" * offload),
        Item("teacher's pass", work, ESTIMATED, f"{tokens} tokens; before the update, not during it", "teacher"),
    )


def _loss_bytes(model: Model, tokens: int, loss: LossConfig, *, gradients: bool) -> int:
    return loss_bytes(
        model.vocab_columns, model.spec.hidden_size, tokens, model.element_bytes, loss, gradients=gradients
    )


def _loss_parts(model: Model, tokens: int, loss: LossConfig) -> str:
    if not loss.fused:
        return f"hidden states, logits and softmax of {tokens} tokens"
    chunk = min(tokens, pick_chunk_tokens(loss.memory_mb, model.vocab_columns, model.element_bytes))
    return f"hidden states, and logits of {chunk} tokens at a time"


def _reserve(size: float) -> Item:
    return Item("reserve", int(size * 1e9), ESTIMATED, "CUDA context, NCCL, work space of kernels, fragmentation")


def _server_memory(config: RunConfig, student: Model) -> ServerMemory:
    rollout, spec = config.rollout, student.spec
    check_server_layout(spec, rollout.tensor_parallel)
    longest = _with_prompt(max(rollout.sampling.max_tokens, config.eval.sampling.max_tokens), student)
    weights = memory.server_weight_bytes(student, rollout.tensor_parallel, rollout.dtype)
    per_token = memory.kv_bytes_per_token(spec, rollout.tensor_parallel, rollout.dtype)
    items = [Item("weights", weights, ESTIMATED, f"TP {rollout.tensor_parallel}, {rollout.dtype}")]
    if config.train.gpus_per_node:
        limit = int(config.train.gpu_memory_gb * 1e9 * rollout.gpu_memory_utilization)
        items.append(_reserve(SERVER_RESERVE_GB))
        cache = limit - sum(item.size for item in items)
        source = f"rest of rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}"
    else:
        cache = int(rollout.kv_cache_gb * 2**30)
        limit = weights + cache
        source = "rollout.kv_cache_gb"
    why = f"{source}, {per_token} bytes a token"
    items.append(Item("KV cache", max(0, cache), EXACT if not config.train.gpus_per_node else ESTIMATED, why))
    return ServerMemory(tuple(items), limit, max(0, cache) // per_token, longest)
