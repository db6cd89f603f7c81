"""Checks that read files, before a rank or a server starts. Each failure is one line."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from rlad_megatron import platform
from rlad_megatron.config import ModelConfig, RolloutConfig, RunConfig
from rlad_megatron.config.bench import decode_lengths
from rlad_megatron.config.placement import has_servers, server_devices
from rlad_megatron.data.presets import reward_name
from rlad_megatron.data.prompts import PromptSource, build_prompts, build_splits, build_traces
from rlad_megatron.data.samples import samples_from_rollout_files
from rlad_megatron.data.table import Prompts
from rlad_megatron.data.tokenizers import Tokenizer, check_same_tokens, load_tokenizer
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.config_json import print_unknown_fields, read_role_spec, read_specs
from rlad_megatron.models.load import HfCheckpoint, open_checkpoint, print_left_out
from rlad_megatron.models.megatron_folder import is_megatron
from rlad_megatron.models.precision import check_fp8_shape, reference_of, uses_transformer_engine
from rlad_megatron.models.recompute import check_activations
from rlad_megatron.models.shard_plan import (
    build_shard_plan,
    check_replayed_model,
    check_server_layout,
    check_student_layout,
    check_vocabularies,
    fingerprint,
)
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.plan.memory import kv_bytes_per_token
from rlad_megatron.platform.megatron_versions import missing_for_gated_delta_nets
from rlad_megatron.rewards.answers import check_answers
from rlad_megatron.rewards.registry import load_reward
from rlad_megatron.run_prompts import FIRST_ROWS, check_traces, fit, print_dropped
from rlad_megatron.secret import read_token
from rlad_megatron.servers.process import check_hybrid_servers, check_kv_cache, check_ports, check_router_replay
from rlad_megatron.servers.sampling import fitting_prompts, max_model_len
from rlad_megatron.servers.transfer.choice import check_transfer
from rlad_megatron.trainer.run_state import check_resumable, check_run_dir, check_writable, find_checkpoint

CHECKED_ANSWERS = 200  # first ones of a split that the reward reads before the start


def check_train(config: RunConfig, *, starts_servers: bool = True) -> None:
    """Everything that `rlad train` can check before it starts.

    starts_servers: whether the run starts its servers itself, on the configured ports.
    Raises a subclass of RladError, naming the field, the value and the remedy.
    """
    if not config.generates:
        raise ConfigError(f"objective.name={config.objective.name} fine-tunes on traces; use `rlad sft`")
    load_reward(reward_name(config.data))
    specs = read_specs(config)
    tokenizer, student_fingerprint = check_model("student", config.student, specs["student"], trained=True, served=True)
    check_activations(config, specs["student"])
    if config.observe.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"observe.wandb_project={config.observe.wandb_project}: wandb is not installed; install it")
    if "teacher" in specs:
        teacher_tokenizer, _ = check_model("teacher", config.teacher, specs["teacher"], served=config.eval.teacher)
        check_same_tokens(tokenizer, teacher_tokenizer, config.student.path, config.teacher.path)
        check_vocabularies(specs["student"], specs["teacher"])
    train, test = check_prompts(config, specs, tokenizer, _loop_state(config, student_fingerprint, "train"))
    check_transfer(config, platform.has_cuda(), os.environ)
    check_replayed_model(config, specs["student"])
    check_router_replay(config.rollout)
    served = {role: spec for role, spec in specs.items() if role == "student" or config.eval.teacher}
    _check_servers(config, served, train, test, starts_servers=starts_servers)


def check_sft(config: RunConfig) -> None:
    """Everything that `rlad sft` can check before it starts. Raises as `check_train`."""
    if config.generates:
        raise ConfigError(
            f"objective.name={config.objective.name}: fine-tuning on traces uses objective.name=cross_entropy"
        )
    specs = read_specs(config)
    tokenizer, student_fingerprint = check_model("student", config.student, specs["student"], trained=True)
    check_activations(config, specs["student"])
    traces = build_traces(config.data, config.sft, tokenizer, FIRST_ROWS)
    if len(traces) < FIRST_ROWS:
        check_traces(config, traces, specs["student"].max_position_embeddings)
    if config.sft.traces:
        build_splits(config.data, tokenizer, FIRST_ROWS)  # rank 0 reads it for the held-out prompts
    _loop_state(config, student_fingerprint, "sft")


def check_evaluate(config: RunConfig) -> None:
    """Everything that `rlad evaluate` can check before it starts. Raises as `check_train`."""
    _check_asked(config, "test", "test on")


def check_generate(config: RunConfig) -> None:
    """Everything that `rlad generate` can check before it starts. Raises as `check_train`."""
    _check_asked(config, "train", "generate for")


def _check_asked(config: RunConfig, split: str, purpose: str) -> None:
    """A model that only answers the prompts of a split. purpose: of the prompts, for messages."""
    check_writable(config)
    load_reward(reward_name(config.data))
    specs = read_specs(config)
    tokenizer, _ = check_model("student", config.student, specs["student"], served=True)
    built = build_prompts(config.data, tokenizer, split)
    check_answers(config.data, built)
    prompts, dropped = fitting_prompts(config, specs, built, split)
    print_dropped(dropped, len(built), f"prompts to {purpose}")
    _check_servers(config, {"student": specs["student"]}, prompts, alone=True)


def check_teacher_gap(config: RunConfig) -> None:
    """Everything that `rlad evaluate --teacher-gap` can check before it starts. Raises as `check_train`."""
    if not config.needs_teacher:
        raise ConfigError(f"objective.name={config.objective.name} has no teacher to measure; use one that has")
    reference, contexts = reference_of(config.teacher), config.teacher.layout.context_parallel
    if reference is None:
        raise ConfigError(
            "teacher.precision=fp32 is the reference of the comparison; give the precision to measure, for example "
            "teacher.precision=bf16"
        )
    if config.train.gpus_per_node and contexts > 1 and reference.precision == "fp32":
        raise ConfigError(
            f"teacher.layout.context_parallel={contexts}: the reference of the comparison is in fp32, whose local "
            "layers take no context parallelism on GPUs; use context_parallel=1"
        )
    spec = read_role_spec("teacher", config.teacher.path)
    if config.train.gpus_per_node and spec.gdn_value_heads and reference.precision == "fp32":
        raise ConfigError(
            f"teacher.path={config.teacher.path}: the reference of the comparison is in fp32, in which gated delta "
            "nets do not run on GPUs; measure an FP8 teacher, whose reference is in bf16, or compare without GPUs"
        )
    check_model("teacher", config.teacher, spec)
    samples_from_rollout_files(config.run_dir / "rollouts")


def check_bench(config: RunConfig, *, teacher_only: bool) -> None:
    """Everything that `rlad bench` can check before it starts. Raises as `check_train`."""
    if teacher_only and not config.needs_teacher:
        raise ConfigError(f"objective.name={config.objective.name} has no teacher to measure; leave out --teacher-only")
    specs = read_specs(config)
    if config.needs_teacher:
        check_model("teacher", config.teacher, specs["teacher"])
    if teacher_only:
        return
    check_model("student", config.student, specs["student"], trained=True)
    check_activations(config, specs["student"])
    if config.needs_teacher:
        check_vocabularies(specs["student"], specs["teacher"])


def check_bench_servers(config: RunConfig) -> None:
    """Everything that `rlad bench --servers-only` can check before it starts. Raises as `check_train`."""
    if not has_servers(config):
        field = f"objective.name={config.objective.name}" if not config.generates else "rollout.urls"
        raise ConfigError(f"{field}: the run starts no servers to measure; leave out --servers-only")
    spec = read_role_spec("student", config.student.path)
    check_model("student", config.student, spec, served=True)
    _check_served(config.rollout, "student", spec, sum(decode_lengths(config.rollout.sampling.max_tokens)))
    check_ports(config.rollout)
    server_devices(config, platform.visible_devices(), alone=True)


def _check_servers(
    config: RunConfig,
    served: Mapping[str, ModelSpec],
    *prompts: Prompts,
    starts_servers: bool = True,
    alone: bool = False,
) -> None:
    """served: by role, the models that servers of the run's own serve one after another."""
    rollout = config.rollout
    if not rollout.urls:
        for role, spec in served.items():
            _check_served(rollout, role, spec, max_model_len(config, *prompts))
    if rollout.token_file:
        read_token(Path(rollout.token_file))
    if starts_servers:
        check_ports(rollout)
        server_devices(config, platform.visible_devices(), alone=alone)


def _check_served(rollout: RolloutConfig, role: str, spec: ModelSpec, model_len: int) -> None:
    check_server_layout(spec, rollout.tensor_parallel, role)
    check_hybrid_servers(rollout, spec, role)
    check_kv_cache(rollout, model_len, kv_bytes_per_token(spec, rollout.tensor_parallel, rollout.dtype))


def check_model(
    role: str, model: ModelConfig, spec: ModelSpec, *, trained: bool = False, served: bool = False
) -> tuple[Tokenizer, str]:
    """The model's folder; returns its tokenizer and its fingerprint. Raises as `check_train`."""
    if served and is_megatron(model.path):
        raise ConfigError(
            f"{role}.path={model.path} is a Megatron checkpoint, which vLLM cannot serve; "
            "write a Hugging Face folder with `rlad convert megatron-to-hf`"
        )
    if spec.gdn_value_heads and (missing := missing_for_gated_delta_nets(gpu=platform.has_cuda())):
        raise ConfigError(f"{role}.path={model.path}: gated delta nets need {missing}; install it")
    if spec.gdn_value_heads and platform.has_cuda() and not uses_transformer_engine(model, gpu=True):
        raise ConfigError(
            f"{role}.precision={model.precision} with {role}.transformer_impl={model.transformer_impl}: on GPUs gated "
            "delta nets run in half precision, between Transformer Engine's layers; use precision=bf16 and "
            "transformer_impl=auto"
        )
    if trained:
        check_student_layout(spec, model.layout)
    print_unknown_fields(model.path, spec)
    try:
        plan = build_shard_plan(spec, model.layout)
    except ConfigError as error:
        raise ConfigError(f"{role}.{error}" if str(error).startswith("layout") else f"{role}: {error}") from None
    check_fp8_shape(role, model, spec)
    checkpoint = open_checkpoint(model.path, spec)
    checkpoint.check(plan)
    print_left_out(checkpoint)
    if served and isinstance(checkpoint, HfCheckpoint) and checkpoint.left_out:
        raise ConfigError(
            f"{role}.path={model.path} is more than a text model, which is what servers get weights for; write its "
            f"text model with `rlad convert hf-to-hf {model.path} FOLDER`"
        )
    tokenizer = load_tokenizer(model.path)
    if tokenizer.size > spec.vocab_size:
        raise ConfigError(
            f"{role}.path={model.path}: the tokenizer has {tokenizer.size} tokens, the model {spec.vocab_size}; "
            "they belong to different models"
        )
    return tokenizer, fingerprint(plan.hf_shapes)


def check_prompts(
    config: RunConfig, specs: Mapping[str, ModelSpec], tokenizer: Tokenizer, loop_state: dict | None = None
) -> tuple[Prompts, Prompts]:
    """The prompts of both splits, or the first ones of large sources. loop_state: of the checkpoint to resume from.

    Raises DataError or ConfigError as `build_splits` and `check_answers`; and if these are all prompts, also as
    `fitting_prompts` and `PromptSource.load_state_dict`. Of the others rank 0 finds out.
    """
    splits = build_splits(config.data, tokenizer, FIRST_ROWS)
    for _, prompts in splits.items():
        check_answers(config.data, prompts[:CHECKED_ANSWERS])
    if not splits.complete:
        return splits.train, splits.test
    fitting = fit(config, specs, splits)
    if loop_state is not None:
        PromptSource(fitting.train, config.train.seed).load_state_dict(loop_state["prompts"])
    return fitting.train, fitting.test


def _loop_state(config: RunConfig, student_fingerprint: str, verb: str) -> dict | None:
    """The loop's state in the checkpoint that the run resumes from; None if it starts from the beginning."""
    check_run_dir(config)
    checkpoints = config.run_dir / "checkpoints"
    source = find_checkpoint(checkpoints, config.resume_step)
    # None: a new run, or one that stopped before its first checkpoint.
    return check_resumable(source, student_fingerprint, verb) if source else None
