"""Norm, rotation and gate on the GPU against plain torch in the same dtype, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from fp4lab.model import kernels, layers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BF16 = torch.bfloat16


def plain(function, *arguments):
    """The same without kernels."""
    taken, kernels.take = kernels.take, lambda x: False
    try:
        return function(*arguments)
    finally:
        kernels.take = taken


def compare(function, inputs, atol=1e-6, equal=0.99, of_mean=2**-7):
    """Values differ by two bf16 roundings (the norm's, the product's) at most; gradients are near those of doubles."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, rounded, want = function(*inputs), plain(function, *inputs), plain(function, *wide)
    assert got.dtype == BF16 and got.shape == rounded.shape
    torch.testing.assert_close(got, rounded, rtol=2**-6, atol=atol)
    assert (got == rounded).float().mean() > equal
    dy = torch.randn_like(got)
    ours, exact = torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, wide, dy.double())
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-6, atol=of_mean * float(b.abs().mean()) + 1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 2560), (2, 7, 4, 128), (1, 2048, 32, 128), (3, 65), (1, 700, 1024)])
def test_rms_norm(shape):
    compare(
        lambda x, w: layers.rms_norm(x, w, 1e-6),
        [torch.randn(shape, device="cuda", dtype=BF16), torch.rand(shape[-1:], device="cuda", dtype=BF16) + 0.5],
    )


@pytest.mark.parametrize("batch, heads, length, width", [(1, 32, 8, 128), (2, 3, 5, 64), (1, 8, 2048, 128)])
def test_rotate(batch, heads, length, width):
    rope = layers.Rope(width, 1e6, "cuda")
    x = torch.randn(batch, length, heads, width, device="cuda", dtype=BF16)

    def turned(x):
        return layers.rotate(x.transpose(1, 2), *rope.table(3, length, x.dtype))

    got, want = turned(x), plain(turned, x)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7)
    dy = torch.randn_like(got)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    (da,), (db,) = torch.autograd.grad(turned(a), a, dy), torch.autograd.grad(plain(turned, b), b, dy.double())
    torch.testing.assert_close(da.double(), db, rtol=2**-6, atol=2**-5)


def test_silu_mul():
    gate, up = torch.randn(2, 5, 9728, device="cuda", dtype=BF16) * 4, torch.randn(2, 5, 9728, device="cuda", dtype=BF16)
    compare(layers.silu_mul, [gate, up])
    assert layers.silu_mul(gate.float(), up.float()).equal(F.silu(gate.float()) * up.float())


def test_grouped_attention_is_the_expanded_one():
    q, k, v = (torch.randn(1, h, 33, 128, device="cuda", dtype=BF16) for h in (32, 8, 8))
    want = F.scaled_dot_product_attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1), is_causal=True)
    torch.testing.assert_close(layers.attend(q, k, v), want, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("shape", [(1, 8, 2560), (2, 7, 96), (1, 700, 1024)])
@pytest.mark.parametrize("both", [True, False])
def test_residual_norm(shape, both):
    """The sum and its norm have the bits of an addition and a norm; the sum's gradient is added up before it is rounded."""
    x, y, d_sum, d_norm = (torch.randn(shape, device="cuda", dtype=BF16) for _ in range(4))
    w = (torch.rand(shape[-1], device="cuda", dtype=BF16) + 0.5).requires_grad_()
    x.requires_grad_()
    y.requires_grad_()
    total, normed = layers.residual_norm(x, y if both else None, w, 1e-6)
    assert torch.equal(total, x + y if both else x)
    assert torch.equal(normed, layers.rms_norm(total, w, 1e-6))
    inputs = [x, w, *([y] if both else [])]
    ours = torch.autograd.grad([total, normed], inputs, [d_sum, d_norm])
    wide = [t.detach().double().requires_grad_() for t in inputs]
    total, normed = plain(layers.residual_norm, wide[0], wide[2] if both else None, wide[1], 1e-6)
    want = torch.autograd.grad([total, normed], wide, [d_sum.double(), d_norm.double()])
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-6, atol=2**-7 * float(b.abs().mean()) + 1e-6)
