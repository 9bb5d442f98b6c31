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
GATED = 1024  # of the gate's: eight a thread. With sixteen its backward takes half as long again


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
        size = rows, x.shape[-1], eps
        _norm[(-(-rows // tile),)](x, x, x, weight, y, rstd, *size, ADD=False, R=tile, H=width, num_warps=warps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        return *_normed_back(x, weight, rstd, dy, None), None


class ResidualNorm(torch.autograd.Function):
    """x and y [..., H], y perhaps None, weight [H] -> x + y and its norm: `layers.residual_norm`.

    The sum's gradient, of which the norm's is a part, is one kernel's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        total = x if y is None else torch.empty_like(x)
        normed, rows = torch.empty_like(x), x.numel() // x.shape[-1]
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        width, tile, warps = _tile(x.shape[-1])
        _norm[(-(-rows // tile),)](
            *(x, x if y is None else y.contiguous(), total, weight, normed, rstd, rows, x.shape[-1], eps),
            ADD=y is not None,
            R=tile,
            H=width,
            num_warps=warps,
        )
        ctx.save_for_backward(total, weight, rstd)
        ctx.both = y is not None
        return total.view_as(total) if y is None else total, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dw = _normed_back(x, weight, rstd, grads[1], grads[0])
        return dx, dx if ctx.both else None, dw, None


def _normed_back(x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and the weight; `more` is added to that of x."""
    dy, dx, rows = dy.contiguous(), torch.empty_like(x), len(rstd)
    width, tile, warps = _tile(x.shape[-1])
    programs = min(PROGRAMS, -(-rows // tile))
    parts = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    each = -(-rows // (tile * programs))
    _norm_back[(programs,)](
        *(x, weight, rstd, dy, dy if more is None else more.contiguous(), dx, parts, rows, x.shape[-1], each),
        MORE=more is not None,
        R=tile,
        H=width,
        num_warps=warps,
    )
    return dx, kernels.sum_parts(parts, weight.dtype)


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


class Heads(torch.autograd.Function):
    """`layers.heads`: one kernel for two norms and two rotations, and none for taking the joint tensor apart."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, queries: int, keys: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, (batch, length, _), width = y.contiguous(), y.shape, q_weight.shape[0]
        q, k = y.new_empty(batch, length, queries, width), y.new_empty(batch, length, keys, width)
        rows = batch * length * (queries + keys)
        rstd = torch.empty(rows, dtype=torch.float32, device=y.device)
        sizes, tile = _halves(width)
        grid = (-(-rows // tile),)
        _heads[grid](y, q_weight, k_weight, cos, sin, q, k, rstd, rows, length, eps, queries, keys, **sizes, R=tile)
        ctx.save_for_backward(y, q_weight, k_weight, cos, sin, rstd)
        v = y.view(batch, length, -1, width)[:, :, queries + keys :]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, q_weight, k_weight, cos, sin, rstd = ctx.saved_tensors
        dq, dk, dv = (g if g.stride(3) == 1 else g.contiguous() for g in grads)  # [B, heads, T, D], lying as attention left it
        (batch, queries, length, width), keys = dq.shape, dk.shape[1]
        strides = [s for g in (dq, dk, dv) for s in g.stride()[:3]]
        dy, rows = torch.empty_like(y), batch * length * (queries + 2 * keys)
        sizes, tile = _halves(width)
        programs = min(PROGRAMS, -(-rows // tile))
        parts = torch.empty(programs, 2 * width, dtype=torch.float32, device=y.device)
        each = -(-rows // (tile * programs))
        _heads_back[(programs,)](
            *(y, q_weight, k_weight, cos, sin, rstd, dq, dk, dv, dy, parts, rows, length, each, queries, keys, *strides),
            **sizes,
            R=tile,
        )
        dw = kernels.sum_parts(parts, q_weight.dtype)
        return dy, dw[:width], dw[width:], None, None, None, None, None


class SiluMul(torch.autograd.Function):
    """silu(gate) * up, both [..., I]: `layers.silu_mul`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _gated(gate, up, gate.shape[-1], gate.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _gated_back(gate, up, dy.contiguous(), dgate, dup, gate.shape[-1], gate.shape[-1])
        return dgate, dup


class JointSiluMul(torch.autograd.Function):
    """The same of gate and up as one tensor [..., 2 I], and their gradients as one."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        both = both.contiguous()
        ctx.save_for_backward(both)
        return gated(both)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        grad, width = torch.empty_like(both), both.shape[-1] // 2
        _gated_back(both, both.view(-1)[width:], dy.contiguous(), grad, grad.view(-1)[width:], width, 2 * width)
        return grad


def _gated(gate: Tensor, up: Tensor, width: int, stride: int) -> Tensor:
    """Rows of `width` that begin every `stride` elements."""
    y = gate.new_empty(*gate.shape[:-1], width)
    _silu_mul[(y.numel() // width, -(-width // GATED))](gate, up, y, width, stride, N=GATED)
    return y


def _gated_back(
    gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor, width: int, stride: int, again: bool = False
) -> None:
    grid = (dy.numel() // width, -(-width // GATED))  # rows first: the second axis ends at 65,535
    _silu_mul_back[grid](gate, up, dy, dgate, dup, width, stride, AGAIN=again, N=GATED)


def gated(both: Tensor) -> Tensor:
    """silu(gate) * up [..., I] of both in one tensor [..., 2 I], contiguous."""
    return _gated(both, both.view(-1)[both.shape[-1] // 2 :], both.shape[-1] // 2, both.shape[-1])


def gate_back_(both: Tensor, dy: Tensor) -> None:
    """Writes the gradient of both [..., 2 I] over them, and `gated`, whose gradient dy [..., I] is, over that; contiguous."""
    width, up = both.shape[-1] // 2, both.view(-1)[both.shape[-1] // 2 :]
    _gated_back(both, up, dy, both, up, width, 2 * width, again=True)


def _halves(width: int) -> tuple[dict[str, int], int]:
    """Half of a head, padded; and the rows of a tile."""
    padded = 1 << (width // 2 - 1).bit_length()
    return {"HALF": width // 2, "P": padded, "num_warps": 4}, max(1, ELEMENTS // (2 * padded))


def _tile(width: int) -> tuple[int, int, int]:
    """Padded width, rows of a tile, warps."""
    padded = 1 << (width - 1).bit_length()
    return padded, max(1, ELEMENTS // padded), 4 if padded <= 4096 else 8


if kernels.triton is not None:
    from fp4lab.nvfp4.kernels import tl, triton

    @triton.jit
    def _norm(
        x, other, total, weight, y, rstd, rows, width, eps, ADD: tl.constexpr, R: tl.constexpr, H: tl.constexpr
    ):  # fmt: skip
        row, column = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, H)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
            value = value.to(total.dtype.element_ty)
            tl.store(total + at, value, mask=inside)
            value = value.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
        w = tl.load(weight + column, mask=column < width, other=0.0).to(y.dtype.element_ty).to(tl.float32)
        rounded = (value * scale[:, None]).to(y.dtype.element_ty).to(tl.float32)
        tl.store(y + at, (rounded * w[None, :]).to(y.dtype.element_ty), mask=inside)
        tl.store(rstd + row, scale, mask=row < rows)

    @triton.jit(do_not_specialize=["rows", "each"])
    def _norm_back(
        x, weight, rstd, dy, more, dx, parts, rows, width, each, MORE: tl.constexpr, R: tl.constexpr, H: tl.constexpr
    ):  # fmt: skip
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
            grad = scale * (d * w - normed * mean)
            if MORE:
                grad += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=inside)
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

    @triton.jit(do_not_specialize=["rows", "length"])
    def _heads(
        y, q_weight, k_weight, cos, sin, q, k, rstd, rows, length, eps, queries, keys,
        HALF: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    ):  # fmt: skip
        row, column = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, P)
        heads = queries + keys
        token, head = row // heads, row % heads
        is_q, column_ok = head < queries, column < HALF
        inside = (row < rows)[:, None] & column_ok[None, :]
        at = (token.to(tl.int64) * (heads + keys) + head)[:, None] * (2 * HALF) + column[None, :]
        a = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(y + at + HALF, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)
        kind = q.dtype.element_ty
        wa = tl.where(is_q[:, None], _row(q_weight, column, column_ok, kind), _row(k_weight, column, column_ok, kind))
        half = column + HALF
        wb = tl.where(is_q[:, None], _row(q_weight, half, column_ok, kind), _row(k_weight, half, column_ok, kind))
        a = ((a * scale[:, None]).to(kind).to(tl.float32) * wa).to(kind).to(tl.float32)
        b = ((b * scale[:, None]).to(kind).to(tl.float32) * wb).to(kind).to(tl.float32)
        turn = (token % length)[:, None] * (2 * HALF) + column[None, :]
        c = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
        first = (a * c).to(kind).to(tl.float32) - (b * s).to(kind).to(tl.float32)
        second = (b * c).to(kind).to(tl.float32) + (a * s).to(kind).to(tl.float32)
        to_q = (token.to(tl.int64) * queries + head)[:, None] * (2 * HALF) + column[None, :]
        to_k = (token.to(tl.int64) * keys + head - queries)[:, None] * (2 * HALF) + column[None, :]
        tl.store(q + to_q, first.to(kind), mask=inside & is_q[:, None])
        tl.store(q + to_q + HALF, second.to(kind), mask=inside & is_q[:, None])
        tl.store(k + to_k, first.to(kind), mask=inside & (head >= queries)[:, None])
        tl.store(k + to_k + HALF, second.to(kind), mask=inside & (head >= queries)[:, None])
        tl.store(rstd + row, scale, mask=row < rows)

    @triton.jit
    def _row(weight, column, ok, kind):
        """A weight as `layers` takes it, [1, P]."""
        return tl.load(weight + column, mask=ok, other=0.0).to(kind).to(tl.float32)[None, :]

    @triton.jit(do_not_specialize=["rows", "length", "each"])
    def _heads_back(
        y, q_weight, k_weight, cos, sin, rstd, dq, dk, dv, dy, parts, rows, length, each, queries, keys,
        q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
        HALF: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, P)
        column_ok, half = column < HALF, column + HALF
        heads = queries + 2 * keys
        kind = dy.dtype.element_ty
        q_a, q_b = tl.zeros((R, P), tl.float32), tl.zeros((R, P), tl.float32)
        k_a, k_b = tl.zeros((R, P), tl.float32), tl.zeros((R, P), tl.float32)
        for n in range(each):
            row = (tl.program_id(0) * each + n) * R + tl.arange(0, R)
            token, head = row // heads, row % heads
            inside = (row < rows)[:, None] & column_ok[None, :]
            is_q, is_v = (head < queries)[:, None], (head >= queries + keys)[:, None]
            is_k = (head >= queries)[:, None] & (head < queries + keys)[:, None]
            at = row.to(tl.int64)[:, None] * (2 * HALF) + column[None, :]
            batch, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
            from_q = (batch * q_batch + head * q_head + place * q_token)[:, None] + column[None, :]
            from_k = (batch * k_batch + (head - queries) * k_head + place * k_token)[:, None] + column[None, :]
            from_v = (batch * v_batch + (head - queries - keys) * v_head + place * v_token)[:, None] + column[None, :]
            d_a = tl.load(dq + from_q, mask=inside & is_q, other=0.0).to(tl.float32)
            d_b = tl.load(dq + from_q + HALF, mask=inside & is_q, other=0.0).to(tl.float32)
            d_a += tl.load(dk + from_k, mask=inside & is_k, other=0.0).to(tl.float32)
            d_b += tl.load(dk + from_k + HALF, mask=inside & is_k, other=0.0).to(tl.float32)
            turn = (token % length)[:, None] * (2 * HALF) + column[None, :]
            c = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
            d_a, d_b = d_a * c + d_b * s, d_b * c - d_a * s
            scale = tl.load(rstd + token * (queries + keys) + head, mask=(row < rows) & (head < queries + keys), other=0.0)
            n_a = tl.load(y + at, mask=inside & (is_q | is_k), other=0.0).to(tl.float32) * scale[:, None]
            n_b = tl.load(y + at + HALF, mask=inside & (is_q | is_k), other=0.0).to(tl.float32) * scale[:, None]
            q_a += tl.where(is_q, d_a * n_a, 0.0)
            q_b += tl.where(is_q, d_b * n_b, 0.0)
            k_a += tl.where(is_k, d_a * n_a, 0.0)
            k_b += tl.where(is_k, d_b * n_b, 0.0)
            d_a *= tl.where(is_q, _row(q_weight, column, column_ok, tl.float32), _row(k_weight, column, column_ok, tl.float32))
            d_b *= tl.where(is_q, _row(q_weight, half, column_ok, tl.float32), _row(k_weight, half, column_ok, tl.float32))
            mean = ((tl.sum(d_a * n_a, axis=1) + tl.sum(d_b * n_b, axis=1)) / (2 * HALF))[:, None]
            g_a = scale[:, None] * (d_a - n_a * mean) + tl.load(dv + from_v, mask=inside & is_v, other=0.0).to(tl.float32)
            g_b = scale[:, None] * (d_b - n_b * mean) + tl.load(dv + from_v + HALF, mask=inside & is_v, other=0.0).to(
                tl.float32
            )
            tl.store(dy + at, g_a.to(kind), mask=inside)
            tl.store(dy + at + HALF, g_b.to(kind), mask=inside)
        origin = parts + tl.program_id(0) * (4 * HALF)
        tl.store(origin + column, tl.sum(q_a, axis=0), mask=column_ok)
        tl.store(origin + half, tl.sum(q_b, axis=0), mask=column_ok)
        tl.store(origin + 2 * HALF + column, tl.sum(k_a, axis=0), mask=column_ok)
        tl.store(origin + 2 * HALF + half, tl.sum(k_b, axis=0), mask=column_ok)

    @triton.jit
    def _silu_mul(gate, up, y, width, stride, N: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
        at, source, inside = row * width + column, row * stride + column, column < width
        g = tl.load(gate + source, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + source, mask=inside, other=0.0).to(tl.float32)
        silu = (g / (1 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
        tl.store(y + at, (silu * u).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _silu_mul_back(gate, up, dy, dgate, dup, width, stride, AGAIN: tl.constexpr, N: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
        at, source, inside = row * width + column, row * stride + column, column < width
        g = tl.load(gate + source, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + source, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-g))
        tl.store(dup + source, (d * g * sigmoid).to(dup.dtype.element_ty), mask=inside)
        slope = sigmoid * (1 + g * (1 - sigmoid))
        tl.store(dgate + source, (d * u * slope).to(dgate.dtype.element_ty), mask=inside)
        if AGAIN:  # as _silu_mul
            silu = (g / (1 + tl.exp(-g))).to(dy.dtype.element_ty).to(tl.float32)
            tl.store(dy + at, (silu * u).to(dy.dtype.element_ty), mask=inside)
