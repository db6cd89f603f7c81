"""The plan of a run: what each GPU holds, and whether it fits. From the configuration alone (`rlad plan`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from rlad_megatron.config import LossConfig, ModelConfig, OptimizerConfig, RunConfig
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.known import ShapeFacts, shape_facts
from rlad_megatron.models.precision import check_fp8_shape, token_multiple, uses_transformer_engine
from rlad_megatron.models.rules import model_shape
from rlad_megatron.models.shard_plan import check_layout, check_server_layout, check_student_layout, check_vocabularies
from rlad_megatron.parallel.loss_memory import loss_bytes, pick_chunk_tokens
from rlad_megatron.plan import memory
from rlad_megatron.plan.memory import Model
from rlad_megatron.plan.placement import has_servers, stage_of

EXACT, ESTIMATED = "exact", "estimated"
PROMPT_TOKENS = 1024  # assumed of the longest prompt, or as many as the response: prompts are not read here
RESERVE_GB = 4.0  # CUDA context, NCCL's buffers, kernels' work space, fragmentation
SERVER_RESERVE_GB = 4.0  # the same, with vLLM's CUDA graphs and the activations of a prefill


@dataclass(frozen=True)
class Item:
    """One line of a GPU's memory."""

    name: str
    size: int  # bytes
    how: str  # exact | estimated
    why: str  # what it is made of
    phase: str = ""  # "": always there; "update" and "teacher" are never there at the same time


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank, of the trainer's or the teacher's own, of those that hold the same."""

    rank: int  # the first of them, in its world
    student_stage: int | None  # None on the teacher's own ranks
    teacher_stage: int | None
    items: tuple[Item, ...]

    @property
    def resting(self) -> int:
        """Bytes that are there while servers generate."""
        return sum(item.size for item in self.items if not item.phase)

    @property
    def size(self) -> int:
        """Bytes at its fullest moment."""
        phases = {
            phase: sum(item.size for item in self.items if item.phase == phase) for phase in ("update", "teacher")
        }
        return self.resting + max(phases.values())


@dataclass(frozen=True)
class ServerMemory:
    """The memory of one GPU of a server."""

    items: tuple[Item, ...]
    limit: int  # bytes that the server may take of its GPU; on CPUs what it takes
    kv_tokens: int  # tokens of all requests that the KV cache holds
    longest: int  # tokens of the longest request

    @property
    def responses(self) -> int:
        """Longest responses that are in flight at a time."""
        return self.kv_tokens // self.longest


@dataclass(frozen=True)
class Plan:
    """What a run needs, and what it has."""

    config: RunConfig
    student: Model
    teacher: Model | None
    longest: int  # tokens of the longest sample, which a micro-batch holds at least
    tokens: int  # of the longest micro-batch
    ranks: tuple[RankMemory, ...]  # the trainer's, one of each kind
    teacher_ranks: tuple[RankMemory, ...]  # the teacher's own, if it has some
    server: ServerMemory | None

    @cached_property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.size)

    @cached_property
    def fullest_teacher(self) -> RankMemory:
        return max(self.teacher_ranks, key=lambda rank: rank.size)

    @property
    def teacher_shortage(self) -> str:
        """Why one of the teacher's own ranks does not fit on its GPU, in a few words; empty if it does."""
        size = self.config.train.gpu_memory_gb
        if not self.teacher_ranks or not self.config.train.gpus_per_node or self.fullest_teacher.size <= size * 1e9:
            return ""
        return (
            f"teacher rank {self.fullest_teacher.rank} needs {gb(self.fullest_teacher.size)} GB and has {size:.1f} GB "
            f"(train.gpu_memory_gb={size:g})"
        )

    @property
    def resting_limit(self) -> int | None:
        """Bytes that a rank may hold while a server generates on its GPU; None where none does."""
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
        # A sleeping server gives weights and cache back; its CUDA context and graphs stay.
        return int((config.train.gpu_memory_gb - SERVER_RESERVE_GB) * 1e9)

    @property
    def trainer_shortage(self) -> str:
        """Why a rank does not fit on its GPU, in a few words; empty if it does."""
        rollout, at_rest = self.config.rollout, max(self.ranks, key=lambda rank: rank.resting)
        asleep = " beside a sleeping server" if rollout.sleep_level else " beside a server that stays awake"
        awake = f" beside a server with rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}"
        return self._lack(
            self.fullest, self.fullest.size, self.trainer_limit, asleep if self.resting_limit is not None else ""
        ) or self._lack(at_rest, at_rest.resting, self.resting_limit, f"{awake} while that generates")

    def _lack(self, rank: RankMemory, size: int, limit: int | None, where: str) -> str:
        if limit is None or size <= limit:
            return ""
        # At rest what comes with a phase is not there, and none of it is the reason.
        items = rank.items if size > rank.resting else [item for item in rank.items if not item.phase]
        largest = max(items, key=lambda item: item.size)
        return (
            f"rank {rank.rank} needs {gb(size)} GB, {largest.name} {gb(largest.size)} of them, and has {gb(limit)} GB"
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
        ConfigError: a model whose sizes are not known, a layout that does not divide it, or responses longer than
            its positions.
    """
    student = shape_facts(config.student.path, "student")
    teacher = shape_facts(config.teacher.path, "teacher") if config.needs_teacher else None
    return plan_models(config, student, teacher)


def plan_models(config: RunConfig, student_facts: ShapeFacts, teacher_facts: ShapeFacts | None) -> Plan:
    """`make_plan` with the models' sizes at hand."""
    student = _model("student", config.student, student_facts)
    teacher = _model("teacher", config.teacher, teacher_facts) if teacher_facts is not None else None
    if teacher is not None:
        check_vocabularies(student.shape, teacher.shape)
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            _check_positions(config, role, model)
    longest = 0  # of the samples: traces are not known before they are read
    if config.objective.name != "cross_entropy":
        longest = _with_prompt(config.rollout.sampling.max_tokens, student)
    multiple = math.lcm(token_multiple(config.student), token_multiple(config.teacher) if teacher else 1)
    tokens = memory.round_up(max(config.train.microbatch_tokens, longest), multiple)
    server = _server_memory(config, student) if has_servers(config) else None
    ranks = _rank_kinds(config, student, None if config.teacher_is_dedicated else teacher, tokens)
    teacher_ranks = _teacher_rank_kinds(config, teacher, tokens) if config.teacher_is_dedicated else ()
    return Plan(config, student, teacher, longest, tokens, ranks, teacher_ranks, server)


def _model(role: str, model: ModelConfig, facts: ShapeFacts) -> Model:
    try:
        check_layout(model_shape(facts), model.layout)
    except ConfigError as error:
        raise ConfigError(f"{role}.{error}") from None
    if role == "student":
        check_student_layout(model_shape(facts), model.layout)
    check_fp8_shape(role, model, model_shape(facts))
    return Model(facts, model.layout, model.precision, model.fp8)


def _check_positions(config: RunConfig, role: str, model: Model) -> None:
    response, room = config.rollout.sampling.max_tokens, model.facts.max_position_embeddings
    if response >= room and config.objective.name != "cross_entropy":
        raise ConfigError(
            f"rollout.sampling.max_tokens={response} and a prompt exceed the {room} positions of the {role}; lower it"
        )


def _with_prompt(response: int, model: Model) -> int:
    """Tokens of the longest sequence, with the assumed prompt as far as the model has positions for it."""
    return min(response + min(response, PROMPT_TOKENS), model.facts.max_position_embeddings)


def _rank_kinds(config: RunConfig, student: Model, teacher: Model | None, tokens: int) -> tuple[RankMemory, ...]:
    """Ranks differ by their stage in the student's pipeline and in the teacher's."""
    on_gpus = config.train.gpus_per_node > 0
    world = config.train.world_size
    kinds: dict[tuple[int, int | None], int] = {}
    stages = math.lcm(student.layout.pipeline_parallel, teacher.layout.pipeline_parallel if teacher else 1)
    for rank in range(0, world, world // stages):  # where a stage of either begins
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
    """The teacher's own ranks differ by their stage in its pipeline."""
    reserve = (_reserve(RESERVE_GB),) if config.train.gpus_per_node else ()
    each = config.teacher_world_size // teacher.layout.pipeline_parallel
    return tuple(
        RankMemory(stage * each, None, stage, _teacher_items(teacher, stage, tokens, config.loss, False) + reserve)
        for stage in range(teacher.layout.pipeline_parallel)
    )


def attention(config: RunConfig, model: ModelConfig) -> str:
    """Of which layers the model's activations are: fused (Transformer Engine's) or local."""
    return "fused" if uses_transformer_engine(model, gpu=config.train.gpus_per_node > 0) else "local"


@lru_cache(maxsize=4096)  # the search for a layout that fits asks again and again
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
            "before it is added up",
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
        model.vocab_columns, model.shape.hidden_size, tokens, model.element_bytes, loss, gradients=gradients
    )


def _loss_parts(model: Model, tokens: int, loss: LossConfig) -> str:
    if not loss.fused:
        return f"hidden states, logits and softmax of {tokens} tokens"
    chunk = min(tokens, pick_chunk_tokens(loss.memory_mb, model.vocab_columns, model.element_bytes))
    return f"hidden states, and logits of {chunk} tokens at a time"


def _reserve(size: float) -> Item:
    return Item("reserve", int(size * 1e9), ESTIMATED, "CUDA context, NCCL, work space of kernels, fragmentation")


def _server_memory(config: RunConfig, student: Model) -> ServerMemory:
    rollout, shape = config.rollout, student.shape
    check_server_layout(shape, rollout.tensor_parallel)
    longest = _with_prompt(max(rollout.sampling.max_tokens, config.eval.sampling.max_tokens), student)
    weights = memory.server_weight_bytes(student, rollout.tensor_parallel, rollout.dtype)
    per_token = memory.kv_bytes_per_token(shape, rollout.tensor_parallel, rollout.dtype)
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
