"""`add_product_`: sums of products in every precision, on both sides of the size from which oneDNN takes over."""

from unittest import mock

import pytest
import torch

from rlad_megatron.kernels import products
from rlad_megatron.kernels.products import add_product_

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def onednn():
    with mock.patch.object(products, "_by_onednn", wraps=products._by_onednn) as calls:
        yield calls


@pytest.fixture(params=[(1 << 20, 1024), (4096, 24)], ids=["whole", "blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK_BYTES", request.param[0])
    monkeypatch.setattr(products, "_BLOCK_ROWS", request.param[1])


@pytest.mark.parametrize("shape", [(3, 5, 7), (64, 256, 48), (64, 256, 0)], ids=["small", "large", "no-columns"])
@pytest.mark.parametrize(
    ("factor_dtype", "sum_dtype", "tolerance"),
    [(FP32, FP32, 1e-6), (BF16, FP32, 3e-3), (BF16, BF16, 4e-3), (FP16, FP32, 1e-6), (FP16, FP16, 1e-3)],
)
@pytest.mark.parametrize("transposed", ["left", "right"])  # as for the weight's gradient, and for logits
def test_sums_match_float64(shape, factor_dtype, sum_dtype, tolerance, transposed, onednn, blocks):
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
    assert onednn.called == (factor_dtype == FP32 and rows == 64 and transposed == "right")


def test_a_part_of_a_matrix_is_added_to_in_place():
    whole = torch.ones(80, 300)
    add_product_(whole[8:72, 20:276], torch.ones(64, 256), torch.ones(256, 256))
    assert (whole[8:72, 20:276] == 257).all()
    assert whole.sum() == 80 * 300 + 256 * 64 * 256
