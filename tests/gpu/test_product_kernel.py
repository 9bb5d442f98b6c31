"""Products with packed matrices that decode on the way, against decoding first."""

import pytest
import torch

from fp4lab.nvfp4 import pack, unpack
from fp4lab.nvfp4.product_kernel import describe, product, product_back, why_not

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def matrix(shape, rule, levels, seed=0):
    w = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    return pack(w * torch.logspace(-6, 0, shape[0], device="cuda").unsqueeze(1), rule, levels)


def close(got, want, of):
    """As far apart as results of the same exact products, summed in fp32 in another order, then rounded to bf16."""
    bound = want.abs() * 2**-8 + of * 2**-20
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("rule, levels", [("torchao", "single"), ("nearest", "tensor"), ("ct", "tensor")])
@pytest.mark.parametrize("shape", [(16, 128), (1024, 2560), (2560, 9728), (48, 384), (4112, 1152)])
@pytest.mark.parametrize("n", [1, 3, 8, 13, 16])
def test_products_are_those_of_the_decoded_matrix(rule, levels, shape, n):
    p = matrix(shape, rule, levels)
    w = unpack(p, torch.float64)
    x = torch.randn(n, shape[1], device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(n, shape[0], device="cuda", dtype=torch.bfloat16)
    assert why_not(p, x.dtype, n) is None
    close(product(x, p), x.double() @ w.T, x.double().abs() @ w.T.abs())
    close(product_back(dy, p), dy.double() @ w, dy.double().abs() @ w.abs())


def test_the_same_call_gives_the_same_bits():
    p = matrix((2560, 4096), "torchao", "single")
    dy = torch.randn(8, 2560, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(product_back(dy, p), product_back(dy, p)) and torch.equal(product(x, p), product(x, p))


def test_a_block_scale_that_is_nan_reaches_the_products():
    p = matrix((64, 256), "torchao", "single")
    p.block_scale.view(torch.uint8)[5, 3] = 0x7F
    x = torch.ones(2, 256, device="cuda", dtype=torch.bfloat16)
    dy = torch.ones(2, 64, device="cuda", dtype=torch.bfloat16)
    assert product(x, p).isnan().nonzero()[:, 1].unique().tolist() == [5]
    assert product_back(dy, p).isnan().nonzero()[:, 1].unique().tolist() == list(range(48, 64))


def test_what_it_is_not_for():
    p, row, odd = (
        matrix((64, 256), "torchao", "single"),
        matrix((64, 256), "nearest", "row"),
        matrix((16, 64), "torchao", "single"),
    )
    assert "bfloat16" in (why_not(p, torch.float32) or "")
    assert "tiles" in (why_not(odd, torch.bfloat16) or "")
    assert "row" in (why_not(row, torch.bfloat16) or "")
    assert "many" in (why_not(p, torch.bfloat16, 17) or "")
    said = describe([p, p, row], torch.bfloat16)
    assert "with 2 of 3 matrices" in said and "per row" in said
