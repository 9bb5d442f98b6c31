"""Every kernel against the codec, bit for bit, on the GPU."""

import pytest
import torch

from fp4lab.nvfp4 import PackedTensor, codec, kernels, pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = {4: torch.int32, 2: torch.int16}[a.element_size()]
    nan = a.isnan() & b.isnan()
    assert torch.equal(a.view(bits).masked_fill(nan, 0), b.view(bits).masked_fill(nan, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale_byte_with_every_code(dtype):
    """256 rows, one scale byte each, all 256 pairs of codes."""
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8, device="cuda").repeat_interleave(32).view(256, 32)
    p = PackedTensor(codes, scales.view(torch.float8_e4m3fn), None, (256, 512))
    same(kernels.unpack(p, dtype), codec.unpack(p, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", ["single", "tensor", "row"])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (7, 40), (130, 2560), (5,), (4, 3, 16), (513, 1024)])
def test_shapes_and_levels(shape, levels, dtype):
    x = torch.randn(shape, device="cuda") * torch.logspace(-6, 3, shape[0], device="cuda").view(-1, *[1] * (len(shape) - 1))
    rules = ("nearest",) if levels == "single" else ("nearest", "ct")
    for rule in rules:
        p = pack(x, rule, levels)
        same(kernels.unpack(p, dtype), codec.unpack(p, dtype))


def test_rows_of_a_fused_buffer():
    p = pack(torch.randn(96, 64, device="cuda"), "torchao")
    for start, stop in ((0, 96), (7, 50), (95, 96)):
        same(kernels.unpack(p.rows(start, stop), torch.bfloat16), codec.unpack(p.rows(start, stop), torch.bfloat16))
