"""Products with a weight decoded on the way, against the decoded weight in fp32."""

import pytest
import torch

from fp4lab.nvfp4 import PackedTensor, codec, matmul, matmul_kernel, matmul_transposed, pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("tokens", [1, 8, 17, 64])
@pytest.mark.parametrize("shape", [(1024, 2560), (2560, 9728), (64, 128), (8192, 2560)])
@pytest.mark.parametrize("levels, rule", [("single", "torchao"), ("tensor", "nearest"), ("tensor", "ct"), ("row", "nearest")])
def test_sums_of_exact_products(tokens, shape, levels, rule):
    p = pack(torch.randn(shape, device="cuda") * 0.02, rule, levels)
    weight = codec.unpack(p, torch.bfloat16).double()
    for product, width, reference in ((matmul, shape[1], weight.T), (matmul_transposed, shape[0], weight)):
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        assert matmul_kernel.takes(x, p)
        got, want = product(x, p).double(), x.double() @ reference
        size = x.double().abs() @ reference.abs()  # what rounding errors are relative to
        assert ((got - want).abs() <= 2**-8 * want.abs() + 1e-6 * size).all()
        assert torch.equal(product(x, p), product(x, p))


def test_every_scale_and_code_is_the_number_that_unpack_gives():
    """One-hot tokens pick single weights; the largest scale is 448."""
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").repeat(64, 1)[:, :64]
    scales = torch.arange(0, 127, dtype=torch.uint8, device="cuda").repeat(5)[: 64 * 8].view(64, 8)
    p = PackedTensor(codes.contiguous(), scales.contiguous().view(torch.float8_e4m3fn), None, (64, 128))
    eye = torch.eye(64, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(matmul_transposed(eye, p), codec.unpack(p, torch.bfloat16))


def test_what_it_does_not_take():
    p = pack(torch.randn(64, 144, device="cuda"))
    assert not matmul_kernel.takes(torch.zeros(4, 144, device="cuda", dtype=torch.bfloat16), p)
    assert not matmul_kernel.takes(torch.zeros(4, 128, device="cuda"), pack(torch.randn(64, 128, device="cuda")))
