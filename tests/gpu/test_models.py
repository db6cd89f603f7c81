"""Models of random weights on the device: packed or alone, in each precision, against float32."""

import pytest
import torch
from transformer_engine_layers import installed, made_without_gpu

from rlad_megatron.config import TRANSFORMER_ENGINE, Fp8Config, LayoutConfig, LossConfig, ModelConfig, TrainConfig
from rlad_megatron.models.registry import FAMILIES

FUSED, MATERIALISING = LossConfig(), LossConfig(fused=False)
# name -> fields of gpu_steps.Variant
LOCAL = {"fp32": {"precision": "fp32"}, "bf16": {}}
ON_ENGINE = {
    "bf16 engine": {},
    **{f"fp8 {recipe}": {"recipe": recipe} for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")},
}
# Cases of the local layers run on the CPU where there is no GPU.
CASES = [*LOCAL, *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_ENGINE)]
FP8_CASES = CASES[-4:]


@pytest.fixture
def engine_layers():
    if not installed():
        pytest.skip("Transformer Engine's layers are not installed")


@pytest.fixture
def variant(request):
    """The variant of a name; skipped, with the reason, where device or Transformer Engine lack something for it."""
    found = make_variant(request.param)
    lacking = gpu_steps().lacking(found)
    if lacking:
        pytest.skip(lacking)
    return found


def gpu_steps():
    """Imported when a test runs: it makes the process ready for Megatron-Core."""
    import gpu_steps

    return gpu_steps


def make_variant(name):
    fields = LOCAL[name] if name in LOCAL else {"transformer_impl": TRANSFORMER_ENGINE, **ON_ENGINE[name]}
    return gpu_steps().Variant(name, **fields)


@pytest.fixture(scope="module")
def reference(groups):
    return gpu_steps().Reference(groups)


@pytest.mark.parametrize("variant", CASES, indirect=True)
@pytest.mark.parametrize("loss", [FUSED, MATERIALISING], ids=["fused", "all-logits"])
def test_loss_and_gradient_against_float32(reference, variant, loss):
    errors = reference.errors(variant, loss)
    for name, bound in gpu_steps().bounds(variant).items():
        assert errors[name] <= bound, errors


EXPERTS = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
FULL, SOME = {"recompute": "full"}, {"recompute": "selective"}
# (case, sizes, fields of TrainConfig)
KEPT = [
    *((case, {}, train) for case in ("fp32", "bf16 engine") for train in (FULL, FULL | {"recompute_layers": 3}, SOME)),
    *((case, EXPERTS, SOME) for case in ("fp32", "bf16 engine")),
    ("fp32", {}, SOME | {"recompute_modules": ("core_attn",)}),
    ("bf16 engine", EXPERTS, SOME | {"recompute_modules": ("moe_act", "layernorm")}),
    # Wide, because Transformer Engine leaves small tensors on the GPU.
    ("bf16 engine", {"intermediate_size": 4096}, {"offload_layers": 3}),
    ("bf16 engine", EXPERTS, {"offload_layers": 3}),
]


@pytest.mark.parametrize(
    ("variant", "sizes", "train"),
    [pytest.param(*kept, marks=pytest.mark.gpu if "engine" in kept[0] else ()) for kept in KEPT],
    indirect=["variant"],
)
def test_what_is_recomputed_or_offloaded_changes_no_gradient(groups, reference, variant, sizes, train):
    steps = gpu_steps()
    spec = steps.qwen3_like(**steps.SMALL | sizes)
    keeping, other = (
        steps.Student(spec, variant.student, groups, train=TrainConfig(**options)) for options in ({}, train)
    )
    other.copy_weights(keeping)
    losses = [student.gradients(reference.samples, budget_tokens=256, loss=FUSED) for student in (keeping, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # Backward of attention on a GPU adds in no fixed order.
    bound = 1e-5 if variant.precision == "fp32" else 1e-2
    found, expected = other.gradient(), keeping.gradient()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=bound * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("variant", CASES, indirect=True)
def test_packed_samples_score_as_each_alone(reference, groups, variant):
    student = gpu_steps().Student(reference.spec, variant.student, groups)
    student.copy_weights(reference.student)
    packed = student.log_probs(reference.samples, budget_tokens=4096, loss=FUSED)
    alone = student.log_probs(reference.samples, budget_tokens=1, loss=FUSED)
    # FP8: one scale for a tensor, or for a tile of it, so what else is in a micro-batch has a share in its rounding.
    bound = {"fp32": 1e-5, "bf16": 0.05}[variant.precision] if variant.recipe == "none" else 0.3
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=0)


@pytest.mark.parametrize("variant", CASES, indirect=True)
def test_an_update_lowers_the_loss(reference, groups, variant):
    if installed() and not torch.cuda.is_available():
        pytest.skip("Megatron takes Transformer Engine's optimizer, which needs a GPU")
    student = gpu_steps().Student(reference.spec, variant.student, groups, lr=1e-3)
    student.copy_weights(reference.student)
    before, after = (student.update(reference.samples, budget_tokens=256, loss=FUSED) for _ in range(2))
    assert after < 0.5 * before, (before, after)


@pytest.mark.parametrize("variant", FP8_CASES, indirect=True)
def test_an_fp8_teacher_holds_its_layers_in_half_the_bytes(groups, variant):
    if variant.recipe == "delayed":
        pytest.skip("a frozen model cannot have delayed scaling")
    spec = gpu_steps().qwen3_like(**gpu_steps().SMALL | {"hidden_size": 1024, "intermediate_size": 4096})
    sizes = []
    for model in (make_variant("bf16 engine").teacher, variant.teacher):
        before = torch.cuda.memory_allocated()
        teacher = gpu_steps().Scorer(spec, model, groups)
        sizes.append(torch.cuda.memory_allocated() - before)
        del teacher
    embedding = 2 * 1024 * gpu_steps().SMALL["vocab_size"]
    assert 0.45 < (sizes[1] - embedding) / (sizes[0] - embedding) < 0.6


@pytest.mark.usefixtures("engine_layers")
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_layers_hold_what_megatrons_own_do(groups, tmp_path, family):
    """Under the same names of the shard plan, from which they are filled, exported and sent to the servers."""
    from tiny_models import make_model  # needs transformers

    from rlad_megatron.models.build import build_loaded_model, named_parameters
    from rlad_megatron.models.config_json import read_model_spec
    from rlad_megatron.models.shard_plan import build_shard_plan

    folder = make_model(tmp_path, family)
    spec = read_model_spec(folder)
    plan = build_shard_plan(spec, LayoutConfig())
    with made_without_gpu():
        on_engine, local = (
            build_loaded_model(spec, ModelConfig(folder, transformer_impl=impl), groups, plan)
            for impl in (TRANSFORMER_ENGINE, "local")
        )
    made_of = {type(module).__name__ for chunk in on_engine for module in chunk.modules()}
    assert made_of > {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
    own = {type(module).__module__ for chunk in local for module in chunk.modules()}
    assert not any("transformer_engine" in module for module in own), own  # also where it is installed
    found, expected = named_parameters(on_engine, spec), named_parameters(local, spec)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("engine_layers")
@pytest.mark.parametrize("sizes", [{}, EXPERTS], ids=["dense", "experts"])
def test_every_product_of_a_student_adds_its_gradient_into_the_float32_buffer(groups, sizes):
    from rlad_megatron.models.build import build_model

    spec = gpu_steps().qwen3_like(**gpu_steps().SMALL | sizes)
    model = ModelConfig(transformer_impl=TRANSFORMER_ENGINE)
    with made_without_gpu():
        (student,), (teacher,) = (build_model(spec, model, groups, frozen=frozen) for frozen in (False, True))
    for gpt, fused in ((student, True), (teacher, False)):
        assert gpt.config.gradient_accumulation_fusion == fused
        products = {
            name: getattr(module, "fuse_wgrad_accumulation", None)
            for name, module in gpt.decoder.named_modules()
            if any(parameter.ndim == 2 for parameter in module.parameters(recurse=False)) and "router" not in name
        }
        assert len(products) == 4 * spec.num_layers and set(products.values()) == {fused}, products


@pytest.mark.usefixtures("engine_layers")
@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_megatron_makes_the_recipe_that_was_asked_for(groups, tmp_path, recipe, fp8_format):
    from megatron.core.fp8_utils import get_fp8_recipe
    from tiny_models import make_model
    from transformer_engine.common.recipe import Format

    from rlad_megatron.models.build import transformer_config
    from rlad_megatron.models.config_json import read_model_spec

    folder = make_model(tmp_path, "qwen3")
    history = {"amax_history_len": 16, "amax_compute": "most_recent"} if recipe == "delayed" else {}
    model = ModelConfig(
        folder, transformer_impl=TRANSFORMER_ENGINE, fp8=Fp8Config(recipe=recipe, format=fp8_format, **history)
    )
    made = get_fp8_recipe(transformer_config(read_model_spec(folder), model))
    assert [
        getattr(made, kind)() for kind in ("delayed", "float8_current_scaling", "float8_block_scaling", "mxfp8")
    ] == [name == recipe for name in ("delayed", "tensorwise", "blockwise", "mxfp8")]
    assert made.fp8_format == {"hybrid": Format.HYBRID, "e4m3": Format.E4M3}[fp8_format]
    if history:
        assert (made.amax_history_len, made.amax_compute_algo) == (16, "most_recent")
