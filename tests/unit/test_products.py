"""`add_product_`: sums of products in every precision, in one block of rows and in several."""

import pytest
import torch

from rlad_megatron.kernels import products
from rlad_megatron.kernels.products import add_product_

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=[1 << 18, 512], ids=["whole", "blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("shape", [(3, 5, 7), (64, 256, 48), (64, 256, 0)], ids=["small", "large", "no-columns"])
@pytest.mark.parametrize(
    ("factor_dtype", "sum_dtype", "tolerance"),
    [(FP32, FP32, 1e-6), (BF16, FP32, 1e-6), (BF16, BF16, 4e-3), (FP16, FP32, 1e-6), (FP16, FP16, 1e-3)],
)
@pytest.mark.parametrize("transposed", ["left", "right"])  # as for the weight's gradient, and for logits
def test_sums_match_float64(shape, factor_dtype, sum_dtype, tolerance, transposed, blocks):
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, depth, generator=generator).to(factor_dtype)
    right = torch.randn(depth, columns, generator=generator).to(factor_dtype)
    if transposed == "left":
        left = left.t().contiguous().t()
    else:
        right = right.t().contiguous().t()
    product = left.double() @ right.double()

    sum_ = torch.full((rows, columns), float("nan"), dtype=sum_dtype)
    add_product_(sum_, left, right, beta=0)
    assert (sum_.double() - product).norm() <= tolerance * product.norm()

    add_product_(sum_, left, right)
    assert (sum_.double() - 2 * product).norm() <= tolerance * 2 * product.norm()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_part_of_a_matrix_is_added_to_in_place(dtype):
    whole = torch.ones(80, 300)
    add_product_(whole[8:72, 20:276], torch.ones(64, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype))
    assert (whole[8:72, 20:276] == 257).all()
    assert whole.sum() == 80 * 300 + 256 * 64 * 256
