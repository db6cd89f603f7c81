"""Models of random weights on the device: packed or alone, in each precision, against float32."""

import pytest
import torch

from rlad_megatron.config import ENGINE, LossConfig

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
    fields = LOCAL[name] if name in LOCAL else {"transformer_impl": ENGINE, **ON_ENGINE[name]}
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


@pytest.mark.parametrize("variant", CASES, indirect=True)
def test_packed_samples_score_as_each_alone(reference, groups, variant):
    student = gpu_steps().Student(reference.hf_config, variant.student, groups)
    student.copy_weights(reference.student)
    packed = student.log_probs(reference.samples, budget_tokens=4096, loss=FUSED)
    alone = student.log_probs(reference.samples, budget_tokens=1, loss=FUSED)
    # FP8: one scale for a tensor, or for a tile of it, so what else is in a micro-batch has a share in its rounding.
    bound = {"fp32": 1e-5, "bf16": 0.05}[variant.precision] if variant.recipe == "none" else 0.3
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=0)


@pytest.mark.parametrize("variant", CASES, indirect=True)
def test_an_update_lowers_the_loss(reference, groups, variant):
    student = gpu_steps().Student(reference.hf_config, variant.student, groups, lr=1e-3)
    student.copy_weights(reference.student)
    before, after = (student.update(reference.samples, budget_tokens=256, loss=FUSED) for _ in range(2))
    assert after < 0.5 * before, (before, after)


@pytest.mark.parametrize("variant", FP8_CASES, indirect=True)
def test_an_fp8_teacher_holds_its_layers_in_half_the_bytes(groups, variant):
    if variant.recipe == "delayed":
        pytest.skip("a frozen model cannot have delayed scaling")
    hf_config = gpu_steps().qwen3_like(**gpu_steps().SMALL | {"hidden_size": 1024, "intermediate_size": 4096})
    sizes = []
    for model in (make_variant("bf16 engine").teacher, variant.teacher):
        before = torch.cuda.memory_allocated()
        teacher = gpu_steps().Scorer(hf_config, model, groups)
        sizes.append(torch.cuda.memory_allocated() - before)
        del teacher
    embedding = 2 * 1024 * gpu_steps().SMALL["vocab_size"]
    assert 0.45 < (sizes[1] - embedding) / (sizes[0] - embedding) < 0.6
