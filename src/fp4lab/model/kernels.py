"""Triton kernels of the pieces between the products: norm, rotation, gate. `layers` is their definition, in plain torch.

Forward values are rounded where `layers` rounds; backward sums stay in fp32 where autograd would round in between.
tests/gpu/test_layer_kernels.py has the bounds.
"""

from typing import Any

import torch
from torch import Tensor

from fp4lab.nvfp4 import kernels

PROGRAMS = 528  # of a backward that sums over rows: each keeps a partial sum of its own, added in a fixed order
ELEMENTS = 2048  # of a tile; short rows (q/k norms) come many at a time


def take(x: Tensor) -> bool:
    """Whether these kernels run for x."""
    return x.dtype in (torch.bfloat16, torch.float16) and kernels.available(x.device)


class RmsNorm(torch.autograd.Function):
    """x [..., H], weight [H] -> [..., H]: `layers.rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, rows = torch.empty_like(x), x.numel() // x.shape[-1]
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        width, tile, warps = _tile(x.shape[-1])
        _norm[(-(-rows // tile),)](x, weight, y, rstd, rows, x.shape[-1], eps, R=tile, H=width, num_warps=warps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dy, dx, rows = dy.contiguous(), torch.empty_like(x), len(rstd)
        width, tile, warps = _tile(x.shape[-1])
        programs = min(PROGRAMS, -(-rows // tile))
        parts = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        each = -(-rows // (tile * programs))
        _norm_back[(programs,)](x, weight, rstd, dy, dx, parts, rows, x.shape[-1], each, R=tile, H=width, num_warps=warps)
        return dx, kernels.sum_parts(parts, weight.dtype), None


class Rotate(torch.autograd.Function):
    """x [B, heads, T, D], cos and sin [T, D] -> the same shape, laid out as [B, T, heads, D]: `layers.rotate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x = x.transpose(1, 2).contiguous()  # [B, T, heads, D]: nothing moves where the norm wrote it so
    batch, length, heads, width = x.shape
    y, rows = torch.empty_like(x), batch * length * heads
    tile = 1 << (max(1, ELEMENTS // width).bit_length() - 1)
    half, padded = width // 2, 1 << (width // 2 - 1).bit_length()
    _rotate[(-(-rows // tile),)](x, cos, sin, y, rows, heads, length, HALF=half, P=padded, R=tile, BACK=back, num_warps=4)
    return y.transpose(1, 2)


class SiluMul(torch.autograd.Function):
    """silu(gate) * up, both [..., I]: `layers.silu_mul`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        _silu_mul[(-(-gate.numel() // ELEMENTS),)](gate, up, y, gate.numel(), N=ELEMENTS)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        grid = (-(-gate.numel() // ELEMENTS),)
        _silu_mul_back[grid](gate, up, dy.contiguous(), dgate, dup, gate.numel(), N=ELEMENTS)
        return dgate, dup


def _tile(width: int) -> tuple[int, int, int]:
    """Padded width, rows of a tile, warps."""
    padded = 1 << (width - 1).bit_length()
    return padded, max(1, ELEMENTS // padded), 4 if padded <= 4096 else 8


if kernels.triton is not None:
    from fp4lab.nvfp4.kernels import tl, triton

    @triton.jit
    def _norm(x, weight, y, rstd, rows, width, eps, R: tl.constexpr, H: tl.constexpr):
        row, column = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, H)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
        w = tl.load(weight + column, mask=column < width, other=0.0).to(y.dtype.element_ty).to(tl.float32)
        rounded = (value * scale[:, None]).to(y.dtype.element_ty).to(tl.float32)
        tl.store(y + at, (rounded * w[None, :]).to(y.dtype.element_ty), mask=inside)
        tl.store(rstd + row, scale, mask=row < rows)

    @triton.jit(do_not_specialize=["rows", "each"])
    def _norm_back(x, weight, rstd, dy, dx, parts, rows, width, each, R: tl.constexpr, H: tl.constexpr):
        column = tl.arange(0, H)
        w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros((H,), tl.float32)
        for n in range(each):
            row = (tl.program_id(0) * each + n) * R + tl.arange(0, R)
            inside = (row < rows)[:, None] & (column < width)[None, :]
            at = row.to(tl.int64)[:, None] * width + column[None, :]
            scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
            normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
            d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
            mean = tl.sum(d * w * normed, axis=1)[:, None] / width
            tl.store(dx + at, (scale * (d * w - normed * mean)).to(dx.dtype.element_ty), mask=inside)
            total += tl.sum(d * normed, axis=0)
        tl.store(parts + tl.program_id(0) * width + column, total, mask=column < width)

    @triton.jit(do_not_specialize=["rows", "length"])
    def _rotate(x, cos, sin, y, rows, heads, length, HALF: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr):
        row, column = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, P)
        inside = (row < rows)[:, None] & (column < HALF)[None, :]
        at = row.to(tl.int64)[:, None] * (2 * HALF) + column[None, :]
        turn = ((row // heads) % length)[:, None] * (2 * HALF) + column[None, :]
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
        if BACK:  # the inverse of a rotation
            s = -s
        kind = y.dtype.element_ty
        first = (a * c).to(kind).to(tl.float32) - (b * s).to(kind).to(tl.float32)
        second = (b * c).to(kind).to(tl.float32) + (a * s).to(kind).to(tl.float32)
        tl.store(y + at, first.to(kind), mask=inside)
        tl.store(y + at + HALF, second.to(kind), mask=inside)

    @triton.jit
    def _silu_mul(gate, up, y, n, N: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
        g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
        u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
        silu = (g / (1 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
        tl.store(y + at, (silu * u).to(y.dtype.element_ty), mask=at < n)

    @triton.jit
    def _silu_mul_back(gate, up, dy, dgate, dup, n, N: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
        g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
        u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=at < n, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-g))
        tl.store(dup + at, (d * g * sigmoid).to(dup.dtype.element_ty), mask=at < n)
        slope = sigmoid * (1 + g * (1 - sigmoid))
        tl.store(dgate + at, (d * u * slope).to(dgate.dtype.element_ty), mask=at < n)
