"""Checks of fields against each other. A field by itself is checked when its section is built (config/tree.py)."""

from __future__ import annotations

from collections.abc import Sequence

from rlad_megatron.config.activations import activation_problems
from rlad_megatron.config.messages import Problems, shown
from rlad_megatron.config.objectives import OBJECTIVES
from rlad_megatron.config.placement import placement_problems
from rlad_megatron.config.precision import precision_problems
from rlad_megatron.config.tree import AHEAD, PHASED, LayoutConfig, RunConfig
from rlad_megatron.errors import ConfigError


def validate(config: RunConfig) -> None:
    """Check fields against each other.

    Raises:
        ConfigError: one line that names the fields, their values and the remedy.
    """
    problems = _model_problems(config) | precision_problems(config) | activation_problems(config)
    problems |= placement_problems(config) | _objective_problems(config) | _run_problems(config)
    for message, applies in problems.items():
        if applies:
            raise ConfigError(message)


def _model_problems(config: RunConfig) -> Problems:
    problems: Problems = {}
    for role, model in config.models:
        world_size, product, layout = config.train.world_size, "train.nodes * train.ranks_per_node", model.layout
        if role == "teacher" and config.teacher_is_dedicated:
            nodes = "teacher" if config.teacher.nodes else "train"
            world_size, product = config.teacher_world_size, f"{nodes}.nodes * teacher.ranks_per_node"
        copies, over = divmod(world_size, layout.copy_ranks)
        contexts = divisors(max(copies, 1))
        problems |= {
            f"{role}.layout.sequence_parallel=true splits tokens over tensor-parallel ranks, but {role}.layout."
            "tensor_parallel=1; use at least 2, or sequence_parallel=false": (
                layout.sequence_parallel and layout.tensor_parallel == 1
            ),
            f"{role}.layout: tensor_parallel={layout.tensor_parallel} * pipeline_parallel={layout.pipeline_parallel} "
            f"does not divide the {world_size} ranks ({product}); use sizes whose product is "
            f"{either(divisors(world_size))}, or a multiple of {layout.model_ranks} ranks": over,
            f"{role}.layout.context_parallel={layout.context_parallel} does not divide the {copies} copies of the "
            f"model on {world_size} ranks ({product}; tensor_parallel={layout.tensor_parallel}, pipeline_parallel="
            f"{layout.pipeline_parallel}); use context_parallel={nearest(layout.context_parallel, contexts)}": (
                not over and layout.context_parallel not in contexts
            ),
            f"{role}.layout.cp_comm_type={layout.cp_comm_type} has no effect with context_parallel=1; drop it, or use "
            "context_parallel=2 or more": layout.cp_comm_type != "p2p" and layout.context_parallel == 1,
            **_layout_problems(f"{role}.layout.", layout, world_size),
        }
    why = f"objective.name={config.objective.name}" if config.needs_teacher else "eval.teacher=true"
    return problems | {
        "student.path is empty; give a folder in Hugging Face format": not config.student.path,
        f"teacher.path is empty, but {why} needs a teacher; give a folder in Hugging Face format, or use "
        "objective.name=grpo and eval.teacher=false": len(config.models) > 1 and not config.teacher.path,
    }


def _layout_problems(section: str, layout: LayoutConfig, world_size: int) -> Problems:
    """Of pipeline stages and experts. The model's sizes are not known here (models/shard_plan.py:check_layout)."""
    needs_stages = {
        "virtual_pipeline": layout.virtual_pipeline > 1,
        "first_stage_layers": layout.first_stage_layers,
        "last_stage_layers": layout.last_stage_layers,
    }
    experts, stage_ranks = layout.experts_tensor_parallel, world_size // layout.pipeline_parallel
    unset = {"virtual_pipeline": 1, "first_stage_layers": 0, "last_stage_layers": 0}
    return {
        f"{section}{field}={getattr(layout, field)} needs pipeline stages, but {section}pipeline_parallel=1; use "
        f"pipeline_parallel of at least 2, or {field}={unset[field]}": asked and layout.pipeline_parallel == 1
        for field, asked in needs_stages.items()
    } | {
        f"{section}expert_tensor_parallel={experts} does not divide the {stage_ranks} ranks of a pipeline stage; use "
        f"{either(divisors(stage_ranks))}": layout.expert_tensor_parallel and stage_ranks % experts,
        f"{section}expert_parallel={layout.expert_parallel} * {experts} ranks for each expert does not divide the "
        f"{stage_ranks} ranks of a pipeline stage; use {either(divisors(stage_ranks // experts))}": (
            stage_ranks % (experts * layout.expert_parallel)
        ),
    }


def _objective_problems(config: RunConfig) -> Problems:
    objective, name = config.objective, config.objective.name
    rollout, most, buffer = config.rollout, objective.dynamic_sampling, objective.overlong_buffer
    longest, kl = rollout.sampling.max_tokens, objective.reference_kl
    reference = f"reference_kl={kl:g}" if kl else "reference_drift=true"
    unused = "objective.reference_kl=0" if kl else "objective.reference_drift=false"
    with_ratio = [name for name, traits in OBJECTIVES.items() if traits.takes_sequence_ratio]
    target = objective.entropy_target
    field, value = ("target", target) if target else ("coefficient", objective.entropy_coefficient)
    return {
        "objective.aggregation=fixed_length divides by rollout.sampling.max_tokens, but the traces of objective.name="
        f"{name} are no such responses; use sequence_mean or token_mean": (
            objective.aggregation == "fixed_length" and not config.generates
        ),
        f"objective.dynamic_sampling={most} leaves no group to replace those with equal rewards; use more than "
        f"rollout.prompts_per_step={rollout.prompts_per_step}, or 0": 0 < most <= rollout.prompts_per_step,
        f"objective.dynamic_sampling={most} replaces groups with equal rewards, which objective.name={name} has not; "
        "set it to 0": most and not OBJECTIVES[name].needs_advantage,
        f"objective.dynamic_sampling={most} waits for every group, but rollout.overprovision={rollout.overprovision} "
        "for the first; set one of them to 0": most and rollout.overprovision,
        f"objective.{reference} needs sampled tokens, but objective.name={name} trains on traces; use {unused}": (
            config.reference and not config.generates
        ),
        f"objective.{reference} scores with a frozen copy of the student, but student.fp8.recipe=delayed takes its "
        f"scales from training steps; use tensorwise, blockwise or mxfp8, or {unused}": (
            config.reference and config.student.fp8.recipe == "delayed"
        ),
        "objective.reference_offload=true has no effect with objective.reference_kl=0 and reference_drift=false; use "
        "false": objective.reference_offload and not config.reference,
        f"rollout.schedule={rollout.schedule} alternates scoring and training, so objective.reference_offload=true "
        "would save no memory; use false, or rollout.schedule=phased": (
            objective.reference_offload and config.schedule != PHASED
        ),
        f"objective.ratio=sequence is a ratio of whole responses, but objective.name={name} needs one for each token; "
        f"use token, or objective.name={either(with_ratio)}": (
            objective.ratio == "sequence" and name not in with_ratio
        ),
        f"objective.entropy_{field}={value:g} needs sampled tokens, but objective.name={name} trains on traces; "
        "use 0": value and not config.generates,
        f"objective.overlong_buffer={buffer} changes rewards, which objective.name={name} does not use; use 0": buffer
        and not OBJECTIVES[name].needs_advantage,
        f"objective.overlong_buffer={buffer} exceeds rollout.sampling.max_tokens={longest}; use at most that": (
            buffer > longest
        ),
        f"objective.overlong_filter=true leaves out responses that were cut off, but objective.name={name} trains on "
        "traces; use false": objective.overlong_filter and not config.generates,
    }


def _run_problems(config: RunConfig) -> Problems:
    rollout, sampling, optimizer, train = config.rollout, config.rollout.sampling, config.optimizer, config.train
    profile = config.profile
    late, absent = max(profile.steps, default=0), max(profile.ranks, default=0)
    alone = OBJECTIVES[config.objective.name].needs_advantage and rollout.group_size == 1
    return {
        f"rollout.group_size=1 gives no group-relative advantage for objective.name={config.objective.name}; use at "
        "least 2, or objective.name=on_policy_kl": alone,
        f"rollout.sampling.top_p={sampling.top_p} makes the sampler's distribution differ from the trained one; use "
        "1.0 (evaluation has eval.sampling.top_p)": sampling.top_p != 1.0,
        "rollout.sampling.temperature=0 samples one response only; use a number above 0": sampling.temperature == 0,
        f"rollout.sampling.temperature={sampling.temperature} divides the logits that objective.name="
        f"{config.objective.name} trains on; use 1.0": sampling.temperature != 1.0 and not config.generates,
        f"rollout.schedule={rollout.schedule} overlaps rollouts and training, but rollout.colocate=true puts both on "
        "the same GPUs; use rollout.schedule=phased": rollout.colocate and config.schedule != PHASED,
        f"rollout.schedule={rollout.schedule} alternates scoring and training, so teacher.offload=true would save "
        "no memory; use teacher.offload=false, teacher.ranks_per_node, or rollout.schedule=phased": (
            config.needs_teacher and config.teacher.offload and config.schedule != PHASED
        ),
        "rollout.schedule=ahead samples with weights that are behind the trained ones; set "
        "objective.mismatch_correction=truncated_is or icepop": (
            config.schedule == AHEAD and config.objective.mismatch_correction == "none"
        ),
        f"rollout.token_file={rollout.token_file} is for rollout.urls, which are not set; leave it empty": (
            not rollout.urls and rollout.token_file
        ),
        f"resume_step={config.resume_step} needs resume=true": config.resume_step and not config.resume,
        f"rollout.port={rollout.port} leaves too few ports for rollout.servers={rollout.servers}; use at most "
        f"{65536 - rollout.servers}": rollout.port + rollout.servers > 65536,
        f"profile.steps={shown(profile.steps)}: the run ends after step {train.steps} (train.steps); name earlier "
        "steps": late > train.steps,
        f"profile.ranks={shown(profile.ranks)}: the trainer's ranks are 0 to {train.world_size - 1}; name some of "
        "those, or none for all": absent >= train.world_size,
        f"profile.ranks={shown(profile.ranks)} has no effect without profile.steps; set both": (
            profile.ranks and not profile.steps
        ),
        "data.eval_size=0 leaves no prompts for evaluation; use at least 1": not config.data.eval_size,
        f"data.chat_template_kwargs={shown(config.data.chat_template_kwargs)} has no effect with data.prompt_style="
        "plain; drop it, or use data.prompt_style=chat": (
            config.data.chat_template_kwargs and config.data.prompt_style == "plain"
        ),
        "data.source=knights_and_knaves makes its own prompts, so data.template and data.columns have no effect; drop "
        "them, or set data.source": (
            config.data.source == "knights_and_knaves"
            and (config.data.template or config.data.columns)
            and not config.data.eval_source
        ),
        f"train.updates_per_rollout={train.updates_per_rollout} does not divide rollout.prompts_per_step="
        f"{rollout.prompts_per_step}: each update takes whole groups": (
            rollout.prompts_per_step % train.updates_per_rollout
        ),
        f"optimizer.min_lr={optimizer.min_lr} exceeds optimizer.lr={optimizer.lr}; use at most that": (
            optimizer.min_lr > optimizer.lr
        ),
        "eval.teacher=true starts a server for the teacher, but rollout.urls is set; use eval.teacher=false and "
        "`rlad evaluate`": config.eval.teacher and rollout.urls,
        f"train.distributed_timeout_s={train.distributed_timeout_s:g} must exceed rollout.startup_timeout_s="
        f"{rollout.startup_timeout_s:g}: the other ranks wait while rank 0 starts servers and generates": (
            train.distributed_timeout_s <= rollout.startup_timeout_s
        ),
    }


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def nearest(number: int, sizes: list[int]) -> int:
    """Of ascending sizes the one that is nearest to `number`, the smaller of two."""
    return min(sizes, key=lambda size: abs(size - number))


def either(sizes: Sequence[int | str]) -> str:
    """[1, 2, 4] as "1, 2 or 4"; at least 1 if there are none."""
    *others, last = map(str, sizes or [1])
    return f"{', '.join(others)} or {last}" if others else last
