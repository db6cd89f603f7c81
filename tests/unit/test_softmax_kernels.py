"""The torch and Triton twins of the fused loss's kernels: statistics and gradients against float64.

Triton's kernels run in its interpreter, on the CPU, and are compiled for GPUs; compiled they have not been run yet.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlad_megatron.kernels import softmax_kernels, softmax_torch
from rlad_megatron.kernels.softmax_torch import NOT_HERE

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["torch", "triton"])
def kernels(request):
    if request.param == "torch":
        return softmax_torch
    if not INTERPRETED:
        pytest.skip("run by test_triton_in_its_interpreter, in a separate process")
    from rlad_megatron.kernels import softmax_triton

    return softmax_triton


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_in_its_interpreter():
    """Triton reads the setting when it is imported, hence another process."""
    command = [sys.executable, "-m", "pytest", __file__, "-k", "triton", "-p", "no:cacheprovider"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stdout
    assert "8 passed" in run.stdout, run.stdout


def make_logits(columns, scale, dtype):
    logits_CV = torch.randn(7, columns, generator=torch.Generator().manual_seed(0)) * scale
    logits_CV[3] = 2.0  # a row of equal logits
    target_C = torch.tensor([0, columns - 1, NOT_HERE, columns // 2, 1, NOT_HERE, 2])
    return logits_CV.to(dtype), target_C


def in_a_buffer(logits_CV):
    """As in the fused loss: row strides are multiples of 128 elements, and the gap may hold anything.

    float16 stays contiguous, to test that layout too.
    """
    if logits_CV.dtype == torch.float16:
        return logits_CV.clone()
    C, columns = logits_CV.shape
    buffer_CV = logits_CV.new_full((C, -(-columns // 128) * 128), float("inf"))[:, :columns]
    return buffer_CV.copy_(logits_CV)


# 5000 is more than one block of the Triton kernels and no multiple of it; 3 is less than a warp.
@pytest.mark.parametrize(
    ("columns", "scale", "dtype", "temperature"),
    [
        (3, 1.0, torch.float32, 1.0),
        (5000, 3.0, torch.float32, 0.7),
        (5000, 1e4, torch.float32, 1.0),
        (5000, 3.0, torch.bfloat16, 0.7),
        (300, 3.0, torch.float16, 1.0),
    ],
)
def test_statistics_and_gradient(kernels, columns, scale, dtype, temperature):
    logits_CV, target_C = make_logits(columns, scale, dtype)
    exact_CV = logits_CV.double()
    x_CV = (exact_CV - exact_CV.amax(1, keepdim=True)) / temperature

    stats_4C = kernels.row_stats_(in_a_buffer(logits_CV), target_C, temperature, entropy=True).double()
    assert torch.equal(stats_4C[0], exact_CV.amax(1))
    torch.testing.assert_close(stats_4C[1], x_CV.exp().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats_4C[3], (x_CV.exp() * x_CV).sum(1), rtol=1e-5, atol=1e-5)
    picked_C = exact_CV.gather(1, target_C.clamp(min=0)[:, None])[:, 0]
    assert torch.equal(stats_4C[2], picked_C.where(target_C != NOT_HERE, float("-inf")))

    buffer_CV = in_a_buffer(logits_CV)
    plain_4C = kernels.row_stats_(buffer_CV, target_C, temperature, entropy=False)
    assert torch.equal(plain_4C[:3].double(), stats_4C[:3]) and torch.all(plain_4C[3] == 0)
    factor_C, value_C = torch.linspace(-2, 3, 7), torch.linspace(5, 6, 7)
    again_CV = buffer_CV.clone()
    kernels.gradient_(buffer_CV, plain_4C, target_C, factor_C, value_C, temperature)
    want_CV = factor_C.double()[:, None] * x_CV.exp()
    rows = target_C != NOT_HERE
    want_CV[rows, target_C[rows]] = value_C.double()[rows]
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(buffer_CV.double(), want_CV, rtol=rounding, atol=1e-6)

    log_factor_C = torch.linspace(1, -2, 7)
    kernels.gradient_(again_CV, plain_4C, target_C, factor_C, value_C, temperature, log_factor_C)
    want_CV += (log_factor_C.double()[:, None] * x_CV * x_CV.exp()).scatter(1, target_C.clamp(min=0)[:, None], 0.0)
    want_CV[~rows, 0] += log_factor_C.double()[~rows] * (x_CV * x_CV.exp())[~rows, 0]
    torch.testing.assert_close(again_CV.double(), want_CV, rtol=rounding, atol=max(1e-5, rounding))


def test_a_shard_without_columns_and_a_chunk_without_tokens(kernels):
    stats_4C = kernels.row_stats_(torch.empty(2, 0), torch.full((2,), NOT_HERE), 1.0, entropy=False)
    inf = float("inf")
    assert stats_4C.tolist() == [[-inf] * 2, [0.0] * 2, [-inf] * 2, [0.0] * 2]
    nothing = torch.empty(0)
    kernels.gradient_(torch.empty(0, 5), torch.empty(4, 0), nothing.long(), nothing, nothing, 1.0)
    assert kernels.row_stats_(torch.empty(0, 5), nothing.long(), 1.0, entropy=False).shape == (4, 0)


def test_a_sum_over_a_real_vocabulary_keeps_float32_precision(kernels):
    logits_CV, target_C = make_logits(151_936, 3.0, torch.float32)
    x_CV = logits_CV.double() - logits_CV.double().amax(1, keepdim=True)
    total_C = kernels.row_stats_(logits_CV, target_C, 1.0, entropy=False)[1]
    torch.testing.assert_close(total_C.double(), x_CV.exp().sum(1), rtol=1e-6, atol=0)


def test_half_precision_is_copied_some_rows_at_a_time():
    """39 MB would be a float32 copy of the logits: too much for what malloc keeps, so that the peak shows it."""
    logits_CV = torch.ones(64, 151_936, dtype=torch.bfloat16)
    target_C, one_C = torch.arange(64), torch.ones(64)

    def resident(field):
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    stats_4C = softmax_torch.row_stats_(logits_CV, target_C, 1.0, entropy=True)
    softmax_torch.gradient_(logits_CV, stats_4C, target_C, one_C, one_C, 1.0)
    assert resident("VmHWM") - before < 20e6


def test_nan_stays_nan(kernels):
    logits_CV, target_C = make_logits(5000, 1.0, torch.float32)
    logits_CV[1, 77] = float("nan")
    total_C = kernels.row_stats_(logits_CV, target_C, 1.0, entropy=False)[1]
    assert total_C.isnan().tolist() == [False, True, False, False, False, False, False]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="Triton compiles nothing in its interpreter")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("entropy", [False, True])
def test_kernels_are_compiled_for_gpus(capability, dtype, entropy, tmp_path, monkeypatch):
    """To machine code that spills no register and, for any vocabulary, reads and writes 128 bits of a row at once."""
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlad_megatron.kernels import softmax_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    floats = dict.fromkeys(("stats", "maximum", "factor", "log_factor", "target_gradient"), "*fp32")
    types = {"logits": f"*{dtype}", "target": "*i64", **floats, "inverse_temperature": "fp32"}
    for kernel in (softmax_triton._row_stats_kernel, softmax_triton._gradient_kernel):
        constants = {"ENTROPY": entropy, "BLOCK": softmax_triton._BLOCK}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        # What Triton finds in the arguments of a call: torch's memory is aligned, and the stride a multiple of 128.
        aligned = [i for i, (name, kind) in enumerate(signature.items()) if name == "stride" or kind.startswith("*")]
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(kernel, signature, constants, attributes)
        made = compile(source, GPUTarget("cuda", capability, 32), {"num_warps": softmax_triton._WARPS})
        file = tmp_path / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "STACK:0 " in used and "LOCAL:0 " in used, used
        assert "ld.global.v4" in made.asm["ptx"]
        assert "st.global.v4" in made.asm["ptx"] or kernel is softmax_triton._row_stats_kernel


def test_cpus_run_the_reference():
    assert softmax_kernels(torch.device("cpu")) is softmax_torch
