"""The plan of a run: what each GPU holds, and whether it fits. Needs only the configuration (`rlad plan`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain

from rlad_megatron.config import RunConfig
from rlad_megatron.config.placement import has_servers
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.config_json import print_unknown_fields, read_or_known_spec
from rlad_megatron.models.precision import check_fp8_shape, token_multiple, uses_transformer_engine
from rlad_megatron.models.recompute import check_activations, modules_of
from rlad_megatron.models.shard_plan import (
    check_layout,
    check_replayed_model,
    check_server_layout,
    check_student_layout,
    check_vocabularies,
)
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.lengths import padded_length
from rlad_megatron.parallel.loss_memory import loss_bytes, pick_chunk_tokens
from rlad_megatron.plan import activations, memory
from rlad_megatron.plan.memory import Model

EXACT, ESTIMATED = "exact", "estimated"
PHASES = ("update", "teacher", "reference")
PROMPT_TOKENS = 1024  # assumed length of the longest prompt, capped by the response: prompts are not read here
RESERVE_GB = 4.0  # of every rank; what is known to need it is added up in `_work_space`
CONTEXT_GB = 0.8  # CUDA context with torch's and Transformer Engine's kernels 0.6; work space of their products 0.2
# Gaps between blocks, as shares of what an update takes and frees. Segments that grow leave few; IPC forbids those.
GAPS, GAPS_WITH_IPC = 0.02, 0.05
SERVER_RESERVE_GB = 4.0  # the same plus vLLM's CUDA graphs and the activations of a prefill
MEMORY_BYTES_PER_S = 4.8e12  # an H200 reads its memory at this rate; most GPUs are slower


@dataclass(frozen=True)
class Item:
    """One line of a GPU's memory."""

    name: str
    size: int  # bytes
    why: str  # what it is made of
    how: str = ESTIMATED  # exact | estimated
    phase: str = ""  # "" is always held; the others, of `PHASES`, exclude each other


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank of the trainer or of a dedicated teacher; stands for all ranks that hold the same."""

    rank: int  # the first of them, in its world
    items: tuple[Item, ...]

    def held(self, phase: str) -> int:
        return sum(item.size for item in self.items if item.phase == phase)

    @property
    def resting(self) -> int:
        """Bytes held while servers generate."""
        return self.held("")

    @property
    def size(self) -> int:
        """Peak bytes."""
        return self.resting + max(map(self.held, PHASES))


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

    def queue_seconds(self, requests: int, tokens: int) -> float:
        """The least that so many of the longest requests take, whose responses have so many tokens.

        Each token reads the weights and, on average, half of the cache.
        """
        weights, *_, cache = (item.size for item in self.items)
        turns = -(-requests // max(1, self.responses))
        return turns * tokens * (weights + cache / 2) / MEMORY_BYTES_PER_S


@dataclass(frozen=True)
class Plan:
    """What a run needs and what it has."""

    config: RunConfig
    student: Model
    teacher: Model | None
    longest: int  # tokens of the longest sample; a micro-batch holds at least as many
    tokens: int  # of the longest micro-batch
    student_stages: tuple[tuple[Item, ...], ...]  # what a rank of each pipeline stage holds
    teacher_stages: tuple[tuple[Item, ...], ...]
    server: ServerMemory | None

    @cached_property
    def ranks(self) -> tuple[RankMemory, ...]:
        """The trainer's, one of each kind."""
        shared = () if self.config.teacher_is_dedicated else self.teacher_stages
        return self._rank_kinds(self.config.train.world_size, self.student_stages, shared)

    @cached_property
    def teacher_ranks(self) -> tuple[RankMemory, ...]:
        """A dedicated teacher's, one of each kind."""
        own = self.teacher_stages if self.config.teacher_is_dedicated else ()
        return self._rank_kinds(self.config.teacher_world_size, own) if own else ()

    def _rank_kinds(self, world: int, *models: tuple[tuple[Item, ...], ...]) -> tuple[RankMemory, ...]:
        """One rank for each combination of stages of the models that a world holds. models: the stages of each."""
        models = tuple(filter(None, models))
        reserve = (_reserve(RESERVE_GB),) if self.config.train.gpus_per_node else ()
        return tuple(
            RankMemory(rank, (*chain(*(stages[stage] for stages, stage in zip(models, at, strict=True))), *reserve))
            for rank, at in stage_kinds(world, *map(len, models))
        )

    def fits_with_teacher_of(self, other: Plan) -> bool:
        """Whether this student and the other plan's teacher fit. Both must have as many tokens, and the same ranks."""
        if self.config.teacher_is_dedicated or self.teacher is None:
            return not (self.trainer_shortage or other.teacher_shortage)
        limit, resting_limit = self.trainer_limit, self.resting_limit
        if limit is None:
            return True
        reserve = int(RESERVE_GB * 1e9)
        students, teachers = self._student_sizes, other._teacher_sizes
        for _, (stage, of_teacher) in stage_kinds(self.config.train.world_size, len(students), len(teachers)):
            resting = students[stage][0] + teachers[of_teacher][0] + reserve
            working = max(*students[stage][1:], *teachers[of_teacher][1:])
            if resting + working > limit or (resting_limit is not None and resting > resting_limit):
                return False
        return True

    @cached_property
    def _student_sizes(self) -> list[tuple[int, ...]]:
        return [_by_phase(items) for items in self.student_stages]

    @cached_property
    def _teacher_sizes(self) -> list[tuple[int, ...]]:
        return [_by_phase(items) for items in self.teacher_stages]

    @cached_property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.size)

    @cached_property
    def fullest_teacher(self) -> RankMemory:
        return max(self.teacher_ranks, key=lambda rank: rank.size)

    @property
    def gpu_limit(self) -> int | None:
        """Bytes of a GPU; None on CPUs, where nothing is refused."""
        train = self.config.train
        return int(train.gpu_memory_gb * 1e9) if train.gpus_per_node else None

    @property
    def resting_limit(self) -> int | None:
        """Bytes that a rank may hold while a server generates on its GPU; None if no server shares it."""
        if self.gpu_limit is None or self.server is None or not self.config.rollout.colocate:
            return None
        return self.gpu_limit - self.server.limit

    @property
    def trainer_limit(self) -> int | None:
        """Bytes that a rank may take while it works; None on CPUs."""
        if self.gpu_limit is None or self.resting_limit is None:
            return self.gpu_limit
        # A sleeping server frees weights and cache; its CUDA context and graphs stay.
        return self.gpu_limit - int(SERVER_RESERVE_GB * 1e9) if self.config.rollout.sleep_level else self.resting_limit

    @property
    def neighbour(self) -> str:
        """The server that shares a working rank's GPU, in a few words; empty if there is none."""
        if self.resting_limit is None:
            return ""
        return f" next to {'a sleeping server' if self.config.rollout.sleep_level else 'a server that stays awake'}"

    @cached_property
    def trainer_shortage(self) -> str:
        """Why a rank does not fit on its GPU, in a few words; empty if it does."""
        at_rest = max(self.ranks, key=lambda rank: rank.resting)
        share = f"rollout.gpu_memory_utilization={self.config.rollout.gpu_memory_utilization:g}"
        generating = f" next to a server with {share} while it generates"
        return self._lack(self.fullest, self.fullest.size, self.trainer_limit, self.neighbour) or self._lack(
            at_rest, at_rest.resting, self.resting_limit, generating
        )

    @cached_property
    def teacher_shortage(self) -> str:
        """Why a dedicated teacher's rank does not fit on its GPU, in a few words; empty if it does."""
        if not self.teacher_ranks:
            return ""
        lack = self._lack(self.fullest_teacher, self.fullest_teacher.size, self.gpu_limit, "")
        return lack and f"teacher {lack}"

    def _lack(self, rank: RankMemory, size: int, limit: int | None, where: str) -> str:
        if limit is None or size <= limit:
            return ""
        # At rest no item of a phase is held, so none of them is the reason.
        largest = max(
            (item for item in rank.items if size > rank.resting or not item.phase), key=lambda item: item.size
        )
        return (
            f"rank {rank.rank} needs {gb(size)} GB ({largest.name} {gb(largest.size)}) and has {gb(limit)} GB"
            f"{where} (train.gpu_memory_gb={self.config.train.gpu_memory_gb:g})"
        )

    @cached_property
    def server_shortage(self) -> str:
        """Why a server does not fit, in a few words; empty if it does."""
        if self.server is None or self.gpu_limit is None or self.server.responses:
            return ""
        return (
            f"a server's KV cache would hold {self.server.kv_tokens} tokens, fewer than the {self.server.longest} of "
            f"one prompt and response (rollout.tensor_parallel={self.config.rollout.tensor_parallel})"
        )

    @property
    def shortage(self) -> str:
        return self.trainer_shortage or self.teacher_shortage or self.server_shortage


@lru_cache(maxsize=1024)
def stage_kinds(world: int, *stages: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """For models of so many pipeline stages on the same ranks: each combination of stages, and its first rank."""
    kinds: dict[tuple[int, ...], int] = {}
    for rank in range(0, world, world // math.lcm(*stages)):
        kinds.setdefault(tuple(rank * number // world for number in stages), rank)
    return tuple((rank, at) for at, rank in kinds.items())


def _by_phase(items: tuple[Item, ...]) -> tuple[int, ...]:
    """Bytes held always, and in each of `PHASES`."""
    return tuple(sum(item.size for item in items if item.phase == phase) for phase in ("", *PHASES))


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def make_plan(config: RunConfig) -> Plan:
    """Count everything. The configuration must have passed `config.validate`.

    Raises:
        ConfigError: a model of unknown sizes, a layout that does not divide it, or responses longer than its positions.
        CheckpointError: a damaged config.json.
    """
    student = read_or_known_spec(config.student.path, "student")
    print_unknown_fields(config.student.path, student)
    teacher = None
    if config.needs_teacher:
        teacher = read_or_known_spec(config.teacher.path, "teacher")
        print_unknown_fields(config.teacher.path, teacher)
    return plan_models(config, student, teacher)


def plan_models(config: RunConfig, student_spec: ModelSpec, teacher_spec: ModelSpec | None) -> Plan:
    """`make_plan` for models whose specs are known."""
    student = _model("student", config, student_spec)
    check_student_layout(student_spec, student.layout)
    check_replayed_model(config, student_spec)
    check_activations(config, student_spec)
    teacher = _model("teacher", config, teacher_spec) if teacher_spec else None
    multiple = token_multiple(config.student)
    if teacher:
        check_vocabularies(student.spec, teacher.spec)
        multiple = math.lcm(multiple, token_multiple(config.teacher))
    # Traces are not read here.
    longest = _with_prompt(config.rollout.sampling.max_tokens, student) if config.generates else 0
    tokens = padded_length(max(config.train.microbatch_tokens, longest), multiple)
    server = _server_memory(config, student) if has_servers(config) else None
    student_stages = tuple(
        _student_items(config, student, stage, tokens) + _reference_items(config, student, stage, tokens)
        for stage in range(student.layout.pipeline_parallel)
    )
    teacher_stages = (
        tuple(_teacher_items(config, teacher, stage, tokens) for stage in range(teacher.layout.pipeline_parallel))
        if teacher
        else ()
    )
    return Plan(config, student, teacher, longest, tokens, student_stages, teacher_stages, server)


def _model(role: str, config: RunConfig, spec: ModelSpec) -> Model:
    model = config.student if role == "student" else config.teacher
    try:
        check_layout(spec, model.layout)
    except ConfigError as error:
        raise ConfigError(f"{role}.{error}") from None
    check_fp8_shape(role, model, spec)
    response, room = config.rollout.sampling.max_tokens, spec.max_position_embeddings
    if response >= room and config.generates:
        raise ConfigError(
            f"rollout.sampling.max_tokens={response} and a prompt exceed the {room} positions of the {role}; lower it"
        )
    return Model(spec, model.layout, model.precision, model.fp8)


def _with_prompt(response: int, model: Model) -> int:
    """Tokens of the longest sequence: a response and the assumed prompt, capped by the model's positions."""
    return min(response + min(response, PROMPT_TOKENS), model.spec.max_position_embeddings)


def _student_items(config: RunConfig, model: Model, stage: int, tokens: int) -> tuple[Item, ...]:
    fp8, optimizer = model.fp8, config.optimizer
    data_parallel = config.train.world_size // model.layout.copy_ranks
    context = model.layout.context_parallel
    own = activations.held_tokens(model, tokens)
    layers = "fused" if uses_transformer_engine(config.student, gpu=config.train.gpus_per_node > 0) else "local"
    in_flight = model.in_flight(stage)
    held = f"{model.layers(stage)} layers of stage {stage}, {model.element_bytes} bytes each"
    if fp8.param_gather:
        held += f"; layers in FP8 ({fp8.recipe}), as rows and as columns"
    master = {0: "", 2: "2 bytes of a master copy and ", 4: "master copy and "}[memory.master_bytes(model, optimizer)]
    moments = "float32" if optimizer.moments == "fp32" else optimizer.moments
    state = f"{master}two moments in {moments}, cut over DP {'x CP ' * (context > 1)}{data_parallel}"
    if optimizer.offload:
        state += f", {optimizer.offload:.0%} of it on the host"
    work = f"{_tokens_held(model, tokens)}, {in_flight:g} micro-batch{'es' * (in_flight > 1)}, {layers} layers, "
    work += _recompute_text(config, model)
    if config.train.offload_layers:
        away = activations.offloaded_bytes(model, tokens, attention=layers, train=config.train)
        work += f"; {config.train.offload_layers} layers wait on the host, {gb(away)} GB for each rank"
    kept = activations.activation_bytes(model, stage, tokens, attention=layers, train=config.train)
    exact = ESTIMATED if fp8.param_gather else EXACT
    items = [
        Item("student weights", memory.weight_bytes(model, stage, data_parallel), held, exact),
        Item("student gradients", memory.gradient_bytes(model, stage, data_parallel), "float32", EXACT),
        Item(
            "student optimizer",
            memory.optimizer_bytes(model, stage, data_parallel, optimizer),
            state,
            ESTIMATED if optimizer.precision_aware else exact,
        ),
        Item(
            "largest gradient", memory.largest_gradient_bytes(model, stage), "before it is accumulated", phase="update"
        ),
        Item("activations", kept, work, phase="update"),
    ]
    copies = memory.fp8_copy_bytes(model, stage)
    if copies:
        items.append(Item("FP8 copies", copies, "of the layers' weights, as rows and as columns", phase="update"))
    if model.is_last(stage):
        logits = f"logits and softmax of {own} tokens"
        if config.loss.fused:
            chunk = min(own, pick_chunk_tokens(config.loss.memory_mb, model.vocab_columns, model.element_bytes))
            logits = f"and logits of {chunk} tokens at a time"
        size = _loss_bytes(config, model, tokens, gradients=True)
        items.append(Item("loss", size, f"hidden states, {logits}", phase="update"))
    if config.train.gpus_per_node:
        freed = sum(item.size for item in items if item.phase == "update")
        needed, parts = _work_space(config, model, stage, tokens, data_parallel, freed)
        if (more := needed - int(RESERVE_GB * 1e9)) > 0:
            items.append(Item("beyond the reserve", more, parts, phase="update"))
    return tuple(items)


def _work_space(
    config: RunConfig, model: Model, stage: int, tokens: int, data_parallel: int, freed: int
) -> tuple[int, str]:
    """What the reserve is for during an update: bytes, and their parts in words. freed: bytes taken and freed again."""
    count = 1 + memory.group_count(model.layout, data_parallel)
    if config.needs_teacher and not config.teacher_is_dedicated:
        count += memory.group_count(config.teacher.layout, data_parallel=1)
    by_ipc = config.rollout.colocate and config.rollout.weight_transfer in ("auto", "ipc")
    gaps = GAPS_WITH_IPC if by_ipc else GAPS
    parts = {
        "CUDA context": int(CONTEXT_GB * 1e9),
        f"NCCL's buffers of {count} groups": memory.group_bytes(count),
        "attention's float32 gradient": activations.attention_work_bytes(model, tokens),
        "unread gradients": memory.unread_gradient_bytes(model, stage),
        f"gaps of {gaps:.0%}": int(gaps * freed),
    }
    return sum(parts.values()), ", ".join(f"{name} {gb(size)}" for name, size in parts.items())


def _recompute_text(config: RunConfig, model: Model) -> str:
    train = config.train
    if train.recompute == "selective":
        return f"recompute of {', '.join(modules_of(train, model.spec))}"
    if train.recompute == "full" and train.recompute_layers:
        chunk = "chunk" if model.layout.virtual_pipeline > 1 else "stage"
        return f"recompute of the first {train.recompute_layers} layers of a {chunk}"
    return "no recompute" if train.recompute == "none" else "recompute of all layers"


def _teacher_items(config: RunConfig, model: Model, stage: int, tokens: int) -> tuple[Item, ...]:
    return _frozen_items("teacher", config, model, stage, tokens, offload=config.teacher.offload)


def _reference_items(config: RunConfig, student: Model, stage: int, tokens: int) -> tuple[Item, ...]:
    """The frozen copy of the starting student, in the student's layout."""
    if config.reference is None:
        return ()
    return _frozen_items("reference", config, student, stage, tokens, offload=config.reference.offload)


def _frozen_items(
    role: str, config: RunConfig, model: Model, stage: int, tokens: int, *, offload: bool
) -> tuple[Item, ...]:
    """A model that only scores. role: its phase too."""
    work = activations.forward_bytes(model, tokens)
    if model.is_last(stage):
        work += _loss_bytes(config, model, tokens, gradients=False)
    fp8 = f"products' weights in FP8 ({model.fp8.recipe}), else " if model.fp8.enabled else ""
    layers = f"{model.layers(stage)} layers of stage {stage}, {fp8}{model.element_bytes} bytes each, frozen"
    exact, phase = ESTIMATED if model.fp8.enabled else EXACT, ""
    if offload:
        layers, phase = f"{layers}; on the host but for its pass", role
    return (
        Item(f"{role} weights", memory.frozen_weight_bytes(model, stage), layers, exact, phase),
        Item(f"{role}'s pass", work, f"{_tokens_held(model, tokens)}; before the update, not during it", phase=role),
    )


def _tokens_held(model: Model, tokens: int) -> str:
    context = model.layout.context_parallel
    return f"{tokens // context} tokens of {tokens} (CP {context})" if context > 1 else f"{tokens} tokens"


def _loss_bytes(config: RunConfig, model: Model, tokens: int, *, gradients: bool) -> int:
    columns, hidden, own = model.vocab_columns, model.spec.hidden_size, activations.held_tokens(model, tokens)
    return loss_bytes(columns, hidden, own, model.element_bytes, config.loss, gradients=gradients)


def _reserve(size: float) -> Item:
    return Item("reserve", int(size * 1e9), "CUDA context, NCCL, work space of kernels, fragmentation")


def _server_memory(config: RunConfig, student: Model) -> ServerMemory:
    rollout, size = config.rollout, config.rollout.tensor_parallel
    check_server_layout(student.spec, size)
    longest = _with_prompt(max(rollout.sampling.max_tokens, config.eval.sampling.max_tokens), student)
    weights = memory.server_weight_bytes(student, size, rollout.dtype)
    per_token = memory.kv_bytes_per_token(student.spec, size, rollout.dtype)
    state = memory.state_bytes_per_request(student.spec, size, rollout.dtype)
    items = [Item("weights", weights, f"TP {size}, {rollout.dtype}")]
    if config.train.gpus_per_node:
        items.append(_reserve(SERVER_RESERVE_GB))
        limit = int(config.train.gpu_memory_gb * 1e9 * rollout.gpu_memory_utilization)
        cache = max(0, limit - sum(item.size for item in items))
        how, source = ESTIMATED, f"rest of rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}"
    else:
        cache = int(rollout.kv_cache_gb * 2**30)
        limit = weights + cache
        how, source = EXACT, "rollout.kv_cache_gb"
    requests = cache // (per_token * longest + state)
    each = f"{per_token} bytes a token" + (f" and {state / 1e6:.0f} MB of state a request" if state else "")
    fit = f"{requests} requests of {longest} tokens fit (rollout.max_concurrency="
    source += f", {each}: {fit}{rollout.max_concurrency})"
    items.append(Item("KV cache", cache, source, how))
    return ServerMemory(tuple(items), limit, (cache - requests * state) // per_token, longest)
