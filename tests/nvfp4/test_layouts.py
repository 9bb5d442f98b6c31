"""The layouts that hardware takes: blocked scales, operands of the native product, rounded activations."""

import pytest
import torch

from fp4lab.nvfp4 import PackedTensor, native, native_available, operand, pack, quantize_activations, swizzle, unpack, unswizzle

SIZES = [(1, 1), (3, 5), (31, 4), (128, 4), (129, 3), (256, 12), (200, 7), (384, 9)]


def scales(rows: int, cols: int) -> torch.Tensor:
    """Distinct enough bytes, none of them NaN."""
    byte = torch.randint(0, 127, (rows, cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows * 31 + cols))
    return byte.view(torch.float8_e4m3fn)


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_swizzle_round_trip(rows, cols):
    """Back to the same bytes, padded with zeros to whole tiles of 128 x 4."""
    plain = scales(rows, cols)
    flat = swizzle(plain)
    assert flat.dtype == plain.dtype and flat.shape == (-(-rows // 128) * 128 * -(-cols // 4) * 4,)
    assert torch.equal(unswizzle(flat, rows, cols).view(torch.uint8), plain.view(torch.uint8))
    used = int((plain.view(torch.uint8) != 0).sum())
    assert int((flat.view(torch.uint8) != 0).sum()) == used


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_swizzle_equals_torchao(rows, cols):
    """Byte for byte what torchao hands to the same product."""
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    plain = scales(rows, cols)
    blocked = utils.to_blocked(plain.view(torch.uint8))
    assert torch.equal(swizzle(plain).view(torch.uint8), blocked)
    assert torch.equal(unswizzle(blocked, rows, cols), plain.view(torch.uint8))


@pytest.mark.parametrize(("row", "col"), [(0, 0), (1, 0), (0, 3), (32, 0), (127, 3), (128, 0), (0, 4), (200, 6)])
def test_swizzle_address(row, col):
    """cuBLAS: tiles of 512 bytes row-major; in one, (r % 32) * 16 + (r // 32) * 4 + c."""
    plain = torch.zeros(256, 8, dtype=torch.uint8)
    plain[row, col] = 1
    tile, r, c = row // 128 * 2 + col // 4, row % 128, col % 4
    assert swizzle(plain).nonzero().tolist() == [[tile * 512 + r % 32 * 16 + r // 32 * 4 + c]]


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """An operand's values: FP4 pairs seen as bytes, scales brought back from the blocked layout."""
    byte = codes.view(torch.uint8)
    rows, half = byte.shape
    return unpack(PackedTensor(byte, unswizzle(scale, rows, half // 8), None, (rows, half * 2)))


def operands(levels: str, rule: str) -> tuple[PackedTensor, PackedTensor]:
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(33, 80, generator=g), torch.randn(130, 80, generator=g) * 0.05
    return pack(a, rule, levels), pack(b, rule, levels)


def test_operand_decodes_to_the_same_values():
    """Nothing but the layout changes: decoded operands multiply to exactly the emulation's product."""
    a, b = operands("single", "torchao")
    left, right = operand(a), operand(b)
    assert left.codes.dtype == torch.float4_e2m1fn_x2 and left.codes.data_ptr() == a.codes.data_ptr()
    assert left.scale.dtype == torch.float8_e4m3fn
    got = decode(*left) @ decode(*right).t()
    assert torch.equal(got, unpack(a) @ unpack(b).t())


@pytest.mark.parametrize(
    ("levels", "rule"), [("single", "torchao"), ("tensor", "nearest"), ("row", "nearest"), ("tensor", "ct"), ("row", "ct")]
)
def test_scaled_matmul_applies_the_second_level(levels, rule, monkeypatch):
    """With torch's product played on the CPU, the result is the product of the decoded matrices."""

    def product(a, b_t, scale_a, scale_b, out_dtype):
        return (decode(a, scale_a) @ decode(b_t.t(), scale_b).t()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    a, b = operands(levels, rule)
    want = unpack(a) @ unpack(b).t()
    got = native.scaled_fp4_matmul(a, b, torch.float32)
    assert got.shape == (33, 130) and torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert native.scaled_fp4_matmul(a, b, torch.bfloat16).dtype == torch.bfloat16


def test_native_is_not_available_on_a_cpu():
    assert not native_available("cpu")


@pytest.mark.parametrize("rule", ["torchao", "native", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 32), (2, 2, 20), (16,)])
def test_quantize_activations(shape, dtype, rule):
    """unpack(pack(x)) row by row of the last dimension, in x's shape and dtype."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(dtype).requires_grad_()
    got = quantize_activations(x, rule)
    flat = x.detach().reshape(-1, shape[-1])
    assert got.dtype == dtype and got.shape == x.shape and not got.requires_grad
    assert torch.equal(got.reshape(flat.shape), unpack(pack(flat, rule)).to(dtype))
    assert not torch.equal(got, x.detach())
    one = quantize_activations(flat[-1], rule)  # blocks never cross rows
    assert torch.equal(got.reshape(flat.shape)[-1], one)
