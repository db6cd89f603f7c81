"""Counts what each GPU of a run holds. Needs only the configuration (`rlad plan`)."""

from __future__ import annotations

import math

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
from rlad_megatron.plan.plan import (
    ESTIMATED,
    EXACT,
    RESERVE_GB,
    SERVER_RESERVE_GB,
    Item,
    Plan,
    ServerMemory,
    gb,
    reserve_item,
)

PROMPT_TOKENS = 1024  # assumed length of the longest prompt, capped by the response: prompts are not read here
CONTEXT_GB = 0.8  # CUDA context with torch's and Transformer Engine's kernels 0.6; work space of their products 0.2
# Gaps between blocks, as shares of what an update takes and frees. Segments that grow leave few; IPC forbids those.
GAPS, GAPS_WITH_IPC = 0.02, 0.05


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


def _server_memory(config: RunConfig, student: Model) -> ServerMemory:
    rollout, size = config.rollout, config.rollout.tensor_parallel
    check_server_layout(student.spec, size)
    longest = _with_prompt(max(rollout.sampling.max_tokens, config.eval.sampling.max_tokens), student)
    weights = memory.server_weight_bytes(student, size, rollout.dtype)
    per_token = memory.kv_bytes_per_token(student.spec, size, rollout.dtype)
    state = memory.state_bytes_per_request(student.spec, size, rollout.dtype)
    items = [Item("weights", weights, f"TP {size}, {rollout.dtype}")]
    if config.train.gpus_per_node:
        items.append(reserve_item(SERVER_RESERVE_GB))
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
