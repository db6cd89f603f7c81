"""Shared by gpu_parts.py and tests/gpu: models with random weights, synthetic rollouts, and steps on them.

Imports only torch, Megatron-Core and this repository. One process. Models are built as in a run (models/build.py,
trainer/setup.py), and steps are made as in a run (models/forward.py, models/head.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import measure
import torch
import torch.distributed as dist

from rlad_megatron import platform

platform.prepare()  # before Megatron-Core is imported

from megatron.core import parallel_state  # noqa: E402

from rlad_megatron.config import (  # noqa: E402
    TRANSFORMER_ENGINE,
    Fp8Config,
    LayoutConfig,
    LossConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from rlad_megatron.data.packing import pack  # noqa: E402
from rlad_megatron.data.synthetic import synthetic_samples  # noqa: E402
from rlad_megatron.errors import ConfigError  # noqa: E402
from rlad_megatron.models.build import build_model, named_parameters  # noqa: E402
from rlad_megatron.models.forward import run_schedule, score_samples  # noqa: E402
from rlad_megatron.models.head import Head  # noqa: E402
from rlad_megatron.models.precision import DeviceFacts, check_device, fp8_warmup_passes, token_multiple  # noqa: E402
from rlad_megatron.models.registry import as_model_spec  # noqa: E402
from rlad_megatron.models.spec import ModelSpec  # noqa: E402
from rlad_megatron.parallel.groups import ModelGroups, build_groups, seed_everything  # noqa: E402
from rlad_megatron.parallel.loss_scaling import no_tokens  # noqa: E402
from rlad_megatron.trainer.loss import token_loss  # noqa: E402
from rlad_megatron.trainer.setup import build_optimizer, gradients_are_finite, wrap_for_training  # noqa: E402
from rlad_megatron.types import Microbatch, Sample  # noqa: E402

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
OBJECTIVE = ObjectiveConfig()  # TRRD as in the paper
FUSED, MATERIALISING = LossConfig(), LossConfig(fused=False)


@dataclass(frozen=True)
class Variant:
    """Precision and layers of student and teacher."""

    name: str
    precision: str = "bf16"
    transformer_impl: str = "local"
    recipe: str = "none"

    @property
    def student(self) -> ModelConfig:
        return ModelConfig(
            precision=self.precision, transformer_impl=self.transformer_impl, fp8=Fp8Config(recipe=self.recipe)
        )

    @property
    def teacher(self) -> TeacherConfig:
        """The same for a frozen model, which cannot use delayed scaling: bf16 instead."""
        recipe = "none" if self.recipe == "delayed" else self.recipe
        return TeacherConfig(
            precision=self.precision, transformer_impl=self.transformer_impl, fp8=Fp8Config(recipe=recipe)
        )


def join() -> ModelGroups:
    """Make this process a world of one rank, as a run makes its ranks."""
    platform.use_expandable_segments()
    platform.setup()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # in a container the host name may not resolve
    platform.init_process_group(600)
    groups = build_groups(LayoutConfig())
    seed_everything(0, groups)
    return groups


def leave() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def lacking(variant: Variant) -> str:
    """Why the variant cannot run here; empty if it can."""
    if variant.transformer_impl != TRANSFORMER_ENGINE:
        return ""
    missing = transformer_engine_missing()
    if missing:
        return f"Transformer Engine: {missing}"
    facts = DeviceFacts(platform.capability(), platform.cuda_version(), platform.transformer_engine_version())
    try:
        check_device(RunConfig(student=variant.student, teacher=variant.teacher), facts)
    except ConfigError as error:
        return str(error)
    return ""


def transformer_engine_missing() -> str:
    """Why Transformer Engine cannot be used here; empty if it can."""
    if not platform.has_cuda():
        return "no CUDA device"
    if platform.transformer_engine_version() is None:
        return "not installed"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a build for another torch or CUDA fails in many ways
        return f"installed, but its import fails: {measure.first_line(error)}"
    return ""


def variants() -> tuple[list[Variant], list[str]]:
    """The variants that can run here, and a line for each that cannot."""
    missing = transformer_engine_missing()
    if missing:
        note = f"Transformer Engine: {missing}; Megatron's local layers with torch's attention, no FP8"
        return [Variant("bf16")], [note]
    wanted = [
        Variant("bf16", transformer_impl=TRANSFORMER_ENGINE),
        *(Variant(f"fp8 {recipe}", transformer_impl=TRANSFORMER_ENGINE, recipe=recipe) for recipe in RECIPES),
    ]
    reasons = {variant: lacking(variant) for variant in wanted}
    notes = [f"{variant.name}: {reason}" for variant, reason in reasons.items() if reason]
    return [variant for variant, reason in reasons.items() if not reason], notes


def qwen3_like(**sizes: object) -> ModelSpec:
    """A Qwen3 of these fields of config.json."""
    given = {"model_type": "qwen3", "tie_word_embeddings": True, "max_position_embeddings": 40960, "rope_theta": 1e6}
    return as_model_spec({**given, **sizes})


def synthetic_rollouts(lengths: list[tuple[int, int]], vocab_size: int) -> list[Sample]:
    """Samples of random tokens, with teacher and old log-probs like those of a near-uniform model.

    lengths: (prompt, response) of each sample.
    """
    samples, generator = synthetic_samples(lengths, vocab_size), torch.Generator().manual_seed(0)
    level = -torch.log(torch.tensor(float(vocab_size)))
    for sample in samples:
        sample.teacher_log_probs = level + torch.randn(sample.response_length, generator=generator)
        sample.old_log_probs = level + 0.1 * torch.randn(sample.response_length, generator=generator)
    return samples


class Scorer:
    """A frozen model with random weights."""

    def __init__(self, spec: ModelSpec, model: ModelConfig, groups: ModelGroups) -> None:
        self.spec, self.config, self.groups = spec, model, groups
        self.chunks = build_model(spec, model, groups, frozen=True)

    def log_probs(self, samples: list[Sample], *, budget_tokens: int, loss: LossConfig) -> list[torch.Tensor]:
        return score_samples(
            self.chunks,
            self.groups,
            samples,
            vocab_size=self.spec.vocab_size,
            temperature=1.0,
            budget_tokens=budget_tokens,
            token_multiple=token_multiple(self.config),
            loss=loss,
        )


class Student(Scorer):
    """A model with random weights in training."""

    def __init__(
        self,
        spec: ModelSpec,
        model: ModelConfig,
        groups: ModelGroups,
        lr: float = 1e-6,
        train: TrainConfig | None = None,
    ) -> None:
        """train: what backward recomputes, and what waits in host memory."""
        self.spec, self.config, self.groups = spec, model, groups
        (self.gpt,) = build_model(spec, model, groups, train=train or TrainConfig())
        optimizer = OptimizerConfig(lr=lr)
        self.chunks = wrap_for_training([self.gpt], groups, optimizer, model)
        self.optimizer, _ = build_optimizer(self.chunks, optimizer, model, 1)
        self._warmup_passes = fp8_warmup_passes(model)  # as in trainer/actor.py

    def copy_weights(self, other: Student) -> None:
        """Copy another student's weights, of either layer implementation, in this one's precision."""
        source = named_parameters([other.gpt], other.spec)
        with torch.no_grad():
            for name, parameter in named_parameters([self.gpt], self.spec).items():
                parameter.copy_(source[name])
        self.optimizer.reload_model_params()  # its float32 copies

    def gradients(self, samples: list[Sample], *, budget_tokens: int, loss: LossConfig) -> float:
        """Compute the gradients of one update and return its loss in nats."""
        multiple = token_multiple(self.config)
        microbatches = pack(samples, budget_tokens=budget_tokens, multiple=multiple, dp_rank=0, dp_size=1)
        for _ in range(self._warmup_passes):
            self._pass(microbatches[:1], loss)
        self._warmup_passes = 0
        return self._pass(microbatches, loss)

    def _pass(self, microbatches: list[Microbatch], loss: LossConfig) -> float:
        head = Head(self.gpt, self.groups, self.spec.vocab_size, 1.0, loss)

        def on_hidden(hidden_NH: torch.Tensor, microbatch: Microbatch):
            value, _ = head.loss(hidden_NH, microbatch.targets, token_loss(microbatch.per_token, OBJECTIVE))
            return value, no_tokens(value.device), value.detach().clone()

        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = run_schedule(self.chunks, self.groups, microbatches, on_hidden, forward_only=False)
        return torch.stack(reports).sum().item()

    def gradient(self) -> dict[str, torch.Tensor]:
        """float32 copies of the gradients, by their names in the shard plan."""
        parameters = named_parameters([self.gpt], self.spec)
        return {name: parameter.main_grad.float().clone() for name, parameter in parameters.items()}

    def update(self, samples: list[Sample], *, budget_tokens: int, loss: LossConfig) -> float:
        value = self.gradients(samples, budget_tokens=budget_tokens, loss=loss)
        if not gradients_are_finite(self.chunks):
            raise ArithmeticError("the gradients are not finite")
        self.optimizer.step()
        return value


SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": 1003,
}
SMALL_LENGTHS = [(16, 90), (1, 1), (40, 61), (7, 1), (3, 200)]
# Gradients are compared at the magnitude that they have in a batch of 2,048 responses of 8,192 tokens, which is this
# factor times that of the 353 tokens above. FP8 has to find scales for it.
LONG_BATCH = 353 / (2048 * 8192)
# Largest relative errors of the loss and of the whole gradient against float32.
BOUNDS = {
    "fp32": {"loss": 1e-5, "gradient": 1e-4},
    "bf16": {"loss": 0.02, "gradient": 0.05},
    "fp8": {"loss": 0.1, "gradient": 0.3},
}


class Reference:
    """The reference: a small student in float32 with Megatron's local layers and the loss from all logits."""

    def __init__(self, groups: ModelGroups) -> None:
        self.groups, self.spec = groups, qwen3_like(**SMALL)
        self.student = Student(self.spec, Variant("fp32", precision="fp32").student, groups)
        with torch.no_grad():
            for parameter in self.student.gpt.parameters():
                parameter.copy_(parameter.bfloat16())  # so that every precision starts from the same weights
        self.samples = synthetic_rollouts(SMALL_LENGTHS, self.spec.vocab_size)
        own = self.student.log_probs(self.samples, budget_tokens=4096, loss=MATERIALISING)
        # Old and teacher log-probs keep every token away from the edges of clip and clamp, whatever the rounding.
        gaps = torch.tensor([0.2, -0.8, 3.0, -0.2, 0.8, -3.0])
        for sample, log_probs in zip(self.samples, own, strict=True):
            sample.old_log_probs = log_probs
            sample.teacher_log_probs = log_probs - gaps.repeat(len(log_probs))[: len(log_probs)]
        self.loss = self.student.gradients(self.samples, budget_tokens=4096, loss=MATERIALISING)
        self.gradient = self.student.gradient()

    def errors(self, variant: Variant, loss: LossConfig) -> dict[str, float]:
        """Relative errors of loss and gradient of a variant's student with the same weights."""
        student = Student(self.spec, variant.student, self.groups)
        student.copy_weights(self.student)
        samples = [replace(sample, weight=sample.weight * LONG_BATCH) for sample in self.samples]
        value = student.gradients(samples, budget_tokens=256, loss=loss) / LONG_BATCH
        gradient = {name: small / LONG_BATCH for name, small in student.gradient().items()}
        assert gradient.keys() == self.gradient.keys()
        difference = sum((gradient[name] - exact).square().sum() for name, exact in self.gradient.items())
        norm = sum(exact.square().sum() for exact in self.gradient.values())
        return {
            "loss": abs(value - self.loss) / abs(self.loss),
            "gradient": (difference / norm).sqrt().item(),
        }


def bounds(variant: Variant) -> dict[str, float]:
    return BOUNDS[variant.precision if variant.recipe == "none" else "fp8"]
