"""One AdamW update of packed rows in one pass on the GPU: reads g, w, m, v and writes w, m, v with their scales.

`train.adamw.update_rows` is its definition, of which it is a reordering: approximate reciprocals and square roots, fused
multiply-adds, and every value inside 2^-10 of itself, so that the 2^126 that turns moved code bits into a number can be part of
a scale. Codes may therefore differ where a value lies within a few ulps of the border between two;
tests/gpu/test_adamw_kernel.py bounds their share. The same call gives the same bits.

A program is one warp and takes a row from left to right, a block of 16 a thread: first for the row's largest gradient, which
the moments' second level needs, then for the update. It is bound by instructions, not by memory (doc/benchmarks.md).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4lab.nvfp4 import kernels
from fp4lab.nvfp4.packed import BLOCK, PackedTensor

WARPS, REGS = 1, None
TILE = 32  # blocks of a row that a program holds at a time
COUNTS = (
    "largest",
    "squares",
    "weights",
    "changed",
    "wanted",
    "lost",
    "made",
    "asked",
    "blocks",
    "full_w",
    "zero_w",
    "zero_m",
    "zero_v",
)
SPREAD = 32  # rows of the counters, so that programs seldom meet on one
# of a hash, for eight elements and their block: odd, random bits (`train.noise`)
LANES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09, 0x8CB92BA7)
FORMATS = ("nvfp4_two_level", "bf16", "fp32")  # of moments
RULES = ("torchao", "nearest")  # of packed weights, to nearest
NUMBERS = 4  # lr, 1 / bias1, 1 / bias2, and the 32 bits that `train.noise.key` adds the tensor to


NEVER = (1 << 31) - 1  # a row that no matrix has


@dataclass(frozen=True)
class Constants:
    """What stays the same over a training: part of the compiled kernel's arguments, not of what a CUDA graph replays."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_update: float | None
    stochastic: bool
    rule: str


def adamw(
    grad: Tensor,
    w: PackedTensor,
    m: "PackedTensor | Tensor",
    v: "PackedTensor | Tensor",
    numbers: Tensor,
    counts: Tensor,
    tensor: int,
    first: int,
    c: Constants,
    count: bool = False,
    borders: tuple[int, int] = (NEVER, NEVER),
) -> None:
    """Updates rows in place. grad [rows, cols]; w, m, v the same rows, m and v two-level packed or floats.

    numbers  fp32 [NUMBERS] on the device: read when the kernel runs, so a captured graph follows them
    counts   fp32 [SPREAD, len(COUNTS)] on the device, zeros at first: added to (largest: maximum)
    count    whether what follows "squares" is counted too; it costs a third of the time more
    tensor   which field of the dither; first: the matrix row that grad's row 0 is
    borders  rows from the first on are of the tensor after it, beginning anew; from the second on of the one after that
    """
    rows, cols = grad.shape
    assert cols % BLOCK == 0 and grad.is_contiguous()
    second = w.global_scale
    _adamw[(rows,)](
        *(grad, *_parts(w), counts if second is None else second, *_moment(m), *_moment(v), numbers, counts),
        *(cols // BLOCK, first, tensor, *borders),
        *(c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.beta2**0.5, c.eps, c.weight_decay, c.max_update or 0.0),
        CAP=c.max_update is not None,
        STOCHASTIC=c.stochastic,
        LEAST=2.0**-6 if c.rule == "torchao" else 2.0**-9,
        SECOND=0 if second is None else 2 if w.divide else 1,
        PACKED=isinstance(m, PackedTensor),
        COUNT=count,
        C=TILE,
        num_warps=WARPS,
        maxnreg=REGS,
    )


def _parts(p: PackedTensor) -> tuple[Tensor, Tensor]:
    return p.codes.view(torch.int32), p.block_scale.view(torch.uint8)


def _moment(m: "PackedTensor | Tensor") -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(m, PackedTensor):
        return m, m, m
    assert m.global_scale is not None
    return *_parts(m), m.global_scale


if kernels.triton is not None:
    from fp4lab.nvfp4.kernels import (
        decode_root,
        decode_tiny,
        floor_scale,
        join,
        join_signed,
        mix,
        positive_scale,
        tl,
        triton,
    )

    _LANE = tl.constexpr(LANES)
    _TINY = tl.constexpr(2.0**-10)
    _BIG = tl.constexpr(2.0**116)  # 2^126 of the codes, 2^-10 of everything
    _DOWN = tl.constexpr(2.0**-126)

    @triton.jit
    def _sqrt(x):
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def _reciprocal(x):
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def _max_or_nan(a, b):
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _block_max(a, b):
        return tl.max(tl.maximum(a, b), axis=1)

    @triton.jit
    def _scaled(x, inverse):
        """x * inverse, as a sum: of a product's bits shifted, ptxas 12.8 makes an integer product of the factors' bits."""
        return tl.fma(x, tl.broadcast_to(inverse[:, None], x.shape), tl.zeros(x.shape, tl.float32))

    @triton.jit
    def _nearest(x, inverse):
        """The code of |x| * inverse below 8, in bits 28..30; `inverse` makes it 2^-126 of itself (see `decode_tiny`)."""
        return _scaled(x, inverse).to(tl.int32, bitcast=True) * 64 + 0x08000000

    @triton.jit
    def _moment_scale(amax, bound):
        """The byte of the block scale [NB], and the inverse of what it stands for; both of values 2^-10 of themselves."""
        wanted = tl.where(bound > 0, amax * (1 / 6) / bound, 0.0)
        scale = tl.minimum(tl.maximum(wanted, 0.001953125), 448.0).to(tl.float8e4nv)
        total = scale.to(tl.float32) * bound
        return scale.to(tl.uint8, bitcast=True), tl.where(total > 0, _reciprocal(total) * _DOWN, 0.0)

    @triton.jit
    def _multipliers(lane):
        m = tl.full(lane.shape, _LANE[0], tl.uint32)
        for j in tl.static_range(1, 8):
            m = tl.where(lane == j, tl.full(lane.shape, _LANE[j], tl.uint32), m)
        return m

    @triton.jit
    def _dithered(x, inverse, h, multipliers):
        """Stochastic codes of eight values a row, the same way: noise is added to the bits, and what it carries over is up."""
        position = _scaled(x, inverse).to(tl.uint32, bitcast=True) * 64
        noise = (h[:, None] * multipliers[None, :]) >> 4
        return tl.minimum(position + noise, 0x7FFFFFFF).to(tl.int32, bitcast=True)

    @triton.jit
    def _outgrown(n, most, limit):
        """Values of blocks of which some grow: at most `most`, and beyond `limit` so large that they saturate."""
        size = tl.minimum(tl.abs(n), most[:, None])
        size = tl.where(tl.abs(n) > limit[:, None], 2 * limit[:, None], size)
        sign = n.to(tl.int32, bitcast=True) & -2147483648
        return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)

    @triton.jit
    def _scale_stochastic(amax, byte, h):
        """New scale bytes; what values are capped at, and beyond what they go to the top, in units of the second level."""
        wanted = amax * (1 / 6)
        byte = tl.where((wanted <= positive_scale(byte) * 0.5) & (byte >= 16), byte - 8, byte)
        grows = wanted > positive_scale(byte)
        low = tl.where(grows, tl.minimum(floor_scale(wanted), 0x7E), byte)
        lo, hi = positive_scale(low), positive_scale(tl.minimum(low + 1, 0x7E))
        noise = ((h * _LANE[8]) >> 13).to(tl.float32) * 1.9073486328125e-06 + 9.5367431640625e-07
        limit = tl.where(grows, 6 * (lo + noise * (hi - lo)), float("inf"))
        return tl.where(amax > limit, tl.minimum(low + 1, 0x7E), low), 6 * lo, limit

    @triton.jit
    def _count(total, before, wanted, after, rescaled, ok):
        """What became of one tile of eight columns a block, added to five sums a block: see `train.health.Health.weights`."""
        moved, asked, lost, made, square = total
        step = tl.where(ok[:, None], wanted - before, 0.0)
        change = tl.where(ok[:, None], after - before, 0.0)
        moved += tl.sum(((change != 0) | (rescaled & ok)[:, None]).to(tl.float32), axis=1)
        asked += tl.sum((step != 0).to(tl.float32), axis=1)
        lost += tl.sum(((step != 0) & (change == 0)).to(tl.float32), axis=1)
        return moved, asked, lost, made + tl.sum(change * step, axis=1), square + tl.sum(step * step, axis=1)

    @triton.jit
    def _abs_max_pair(a, b):
        """The larger magnitudes of two bf16 in 32 bits each."""
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $2, 0x7FFF7FFF; max.bf16x2 $0, $1, t; }",
            "=r,r,r",
            [a, b],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def _row_max(g_ptr, row, blocks, C: tl.constexpr):
        """The largest magnitude of a row of 16 `blocks` numbers."""
        block, lane = tl.arange(0, C), tl.arange(0, 8)
        origin = row.to(tl.int64) * blocks
        if g_ptr.dtype.element_ty == tl.bfloat16:
            pairs = tl.zeros((C, 8), tl.int32)
            for start in range(0, blocks, C):
                at = (origin + start + block)[:, None] * 8 + lane[None, :]
                inside = (start + block < blocks)[:, None]
                pairs = _abs_max_pair(pairs, tl.load(g_ptr.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0))
            low, high = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
            top = tl.maximum(low, high)
        else:
            top = tl.zeros((C, 8), tl.float32)
            for start in range(0, blocks, C):
                at = (origin + start + block)[:, None] * 16 + lane[None, :]
                inside = (start + block < blocks)[:, None]
                g0 = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
                g1 = tl.load(g_ptr + 8 + at, mask=inside, other=0.0).to(tl.float32)
                top = tl.maximum(top, tl.maximum(tl.abs(g0), tl.abs(g1)))
        return tl.max(tl.max(top, axis=1), axis=0)

    @triton.jit(do_not_specialize=["first", "tensor", "border1", "border2"])
    def _adamw(
        g_ptr, wc, ws, wg, mc, ms, mg, vc, vs, vg, numbers, counts,
        blocks, first, tensor, border1, border2,
        beta1, rest1, beta2, rest2, root_beta2, eps, decay, cap,
        CAP: tl.constexpr, STOCHASTIC: tl.constexpr, LEAST: tl.constexpr, SECOND: tl.constexpr, PACKED: tl.constexpr,
        COUNT: tl.constexpr, 
        C: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        counts += (row % 32) * 13
        block = tl.arange(0, C)
        lane = tl.arange(0, 8)
        multipliers = _multipliers(lane)
        lr, c1, c2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
        tensor += (row >= border1).to(tl.int32) + (row >= border2).to(tl.int32)
        first += row - tl.where(row >= border2, border2, tl.where(row >= border1, border1, 0))
        key = mix(tl.load(numbers + 3).to(tl.uint32, bitcast=True) + tensor.to(tl.uint32))
        origin = row.to(tl.int64) * blocks

        if PACKED:  # second-level scales of the moments, before and after
            unit = _row_max(g_ptr, row, blocks, C) / 2688.0
            m_old, v_old = tl.load(mg + row), tl.load(vg + row)
            m_new = m_old * beta1 + unit * rest1
            v_new = tl.sqrt(v_old * v_old * beta2 + unit * unit * rest2)
            tl.store(mg + row, m_new)
            tl.store(vg + row, v_new)

        # update = m c1 / (sqrt(v c2) + eps). Inside, m is 2^-10 of itself and v such that a gradient's square has no factor.
        m_in = rest1 * _TINY
        v_root = m_in / tl.sqrt(rest2)
        eps_in, root_in = eps * _TINY / c1, tl.sqrt(c2) / c1 * (_TINY / v_root)
        if PACKED:
            m_old, v_old = m_old * beta1 * _BIG, v_old * root_beta2 * v_root
            m_new, v_new = m_new * _TINY, v_new * v_root
        unit = 1024.0  # what a weight is inside, times this, is the weight: it stays in units of its second level
        if SECOND == 1:
            unit *= tl.load(wg)
        if SECOND == 2:
            unit /= tl.load(wg)
        step = tl.maximum(lr / unit, 1e-30)  # part of the update's denominator; nothing moves by the least of it
        eps_in, root_in, cap = eps_in / step, root_in / step, cap * step
        keep = (1 - lr * decay) * _BIG
        largest = tl.zeros((C,), tl.float32)
        squares = tl.zeros((C, 8), tl.float32)
        none = tl.zeros((C,), tl.float32)
        total, full, zero_w, zero_m, zero_v = (none, none, none, none, none), none, none, none, none
        for start in range(0, blocks, C):
            ok = start + block < blocks
            inside = ok[:, None]
            at = origin + start + block
            values = at[:, None] * 16 + lane[None, :]
            g0 = tl.load(g_ptr + values, mask=inside, other=0.0).to(tl.float32)
            g1 = tl.load(g_ptr + 8 + values, mask=inside, other=0.0).to(tl.float32)
            w0 = tl.load(wc + at * 2, mask=ok, other=0)
            w1 = tl.load(wc + at * 2 + 1, mask=ok, other=0)
            byte = tl.load(ws + at, mask=ok, other=0).to(tl.int32)
            g0, g1 = g0 * m_in, g1 * m_in
            squares += g0 * g0
            squares += g1 * g1
            if PACKED:
                m0 = tl.load(mc + at * 2, mask=ok, other=0)
                m1 = tl.load(mc + at * 2 + 1, mask=ok, other=0)
                v0 = tl.load(vc + at * 2, mask=ok, other=0)
                v1 = tl.load(vc + at * 2 + 1, mask=ok, other=0)
                m_scale = positive_scale(tl.load(ms + at, mask=ok, other=0).to(tl.int32)) * m_old
                v_scale = positive_scale(tl.load(vs + at, mask=ok, other=0).to(tl.int32)) * v_old
                m0 = decode_tiny(m0, lane) * m_scale[:, None] + g0
                m1 = decode_tiny(m1, lane) * m_scale[:, None] + g1
                v0 = decode_root(v0, lane) * v_scale[:, None]
                v1 = decode_root(v1, lane) * v_scale[:, None]
                v0 = g0 * g0 + v0 * v0
                v1 = g1 * g1 + v1 * v1
            else:
                m0 = tl.load(mc + values, mask=inside, other=0.0).to(tl.float32) * (beta1 * _TINY) + g0
                m1 = tl.load(mc + 8 + values, mask=inside, other=0.0).to(tl.float32) * (beta1 * _TINY) + g1
                v0 = tl.load(vc + values, mask=inside, other=0.0).to(tl.float32) * (beta2 * m_in * m_in / rest2) + g0 * g0
                v1 = tl.load(vc + 8 + values, mask=inside, other=0.0).to(tl.float32) * (beta2 * m_in * m_in / rest2) + g1 * g1
            q0, q1 = _sqrt(v0), _sqrt(v1)
            u0, u1 = m0 * _reciprocal(q0 * root_in + eps_in), m1 * _reciprocal(q1 * root_in + eps_in)
            if CAP:
                u0 = tl.minimum(tl.maximum(u0, -cap), cap)
                u1 = tl.minimum(tl.maximum(u1, -cap), cap)
            largest = tl.maximum(largest, _block_max(tl.abs(u0), tl.abs(u1)))
            scale = (positive_scale(byte) * keep)[:, None]
            n0 = decode_tiny(w0, lane) * scale - u0
            n1 = decode_tiny(w1, lane) * scale - u1

            if PACKED:
                m_byte, inverse = _moment_scale(_block_max(tl.abs(m0), tl.abs(m1)), m_new)
                tl.store(ms + at, m_byte, mask=ok)
                tl.store(mc + at * 2, join_signed(_nearest(m0, inverse), m0), mask=ok)
                tl.store(mc + at * 2 + 1, join_signed(_nearest(m1, inverse), m1), mask=ok)
                v_byte, inverse = _moment_scale(_block_max(q0, q1), v_new)
                tl.store(vs + at, v_byte, mask=ok)
                tl.store(vc + at * 2, join(_nearest(q0, inverse)), mask=ok)
                tl.store(vc + at * 2 + 1, join(_nearest(q1, inverse)), mask=ok)
            else:
                tl.store(mc + values, (m0 * 1024.0).to(mc.dtype.element_ty), mask=inside)
                tl.store(mc + 8 + values, (m1 * 1024.0).to(mc.dtype.element_ty), mask=inside)
                tl.store(vc + values, (v0 * (rest2 / (m_in * m_in))).to(vc.dtype.element_ty), mask=inside)
                tl.store(vc + 8 + values, (v1 * (rest2 / (m_in * m_in))).to(vc.dtype.element_ty), mask=inside)

            amax = tl.reduce(_max_or_nan(tl.abs(n0), tl.abs(n1)), 1, _max_or_nan) * 1024
            if STOCHASTIC:
                index = (first.to(tl.int64) * blocks + start + block).to(tl.uint32) * 2
                h0 = mix(index ^ key)
                new_byte, most, limit = _scale_stochastic(amax, byte, h0)
                inverse = tl.where(new_byte > 0, _reciprocal(positive_scale(new_byte)) * (1024 * _DOWN), 0.0)
                t0, t1, most = n0, n1, most * _TINY
                if COUNT:  # noqa: SIM114 - Triton 3.6 compiles this without the branch only
                    t0, t1 = _outgrown(n0, most, limit * _TINY), _outgrown(n1, most, limit * _TINY)
                elif tl.max((amax > limit).to(tl.int32), axis=0) > 0:  # few tiles have such a block
                    t0, t1 = _outgrown(n0, most, limit * _TINY), _outgrown(n1, most, limit * _TINY)
                n0_code = _dithered(t0, inverse, h0, multipliers)
                n1_code = _dithered(t1, inverse, mix((index + 1) ^ key), multipliers)
            else:
                rounded = tl.minimum(tl.maximum(amax * (1 / 6), LEAST), 448.0).to(tl.float8e4nv)
                new_byte = rounded.to(tl.uint8, bitcast=True).to(tl.int32)
                inverse = _reciprocal(rounded.to(tl.float32)) * (1024 * _DOWN)
                most = (rounded.to(tl.float32) * (6 * _TINY))[:, None]
                n0_code = _nearest(tl.minimum(tl.abs(n0), most), inverse)
                n1_code = _nearest(tl.minimum(tl.abs(n1), most), inverse)
            w0_new, w1_new = join_signed(n0_code, n0), join_signed(n1_code, n1)
            tl.store(wc + at * 2, w0_new, mask=ok)
            tl.store(wc + at * 2 + 1, w1_new, mask=ok)
            tl.store(ws + at, tl.where(amax < float("inf"), new_byte, 0x7F).to(tl.uint8), mask=ok)
            if COUNT:
                old, new = (positive_scale(byte) * _BIG)[:, None], (positive_scale(new_byte) * _BIG)[:, None]
                rescaled = new_byte != byte
                total = _count(total, decode_tiny(w0, lane) * old, n0, decode_tiny(w0_new, lane) * new, rescaled, ok)
                total = _count(total, decode_tiny(w1, lane) * old, n1, decode_tiny(w1_new, lane) * new, rescaled, ok)
                full += (ok & (new_byte == 0x7E)).to(tl.float32)
                zero_w += (ok & (new_byte == 0)).to(tl.float32)
                if PACKED:
                    zero_m += (ok & (m_byte == 0)).to(tl.float32)
                    zero_v += (ok & (v_byte == 0)).to(tl.float32)
        if COUNT:
            moved, asked, lost, made, square = total
            tl.atomic_add(counts + 2, 16.0 * blocks, sem="relaxed")
            tl.atomic_add(counts + 3, tl.sum(moved, axis=0), sem="relaxed")
            tl.atomic_add(counts + 4, tl.sum(asked, axis=0), sem="relaxed")
            tl.atomic_add(counts + 5, tl.sum(lost, axis=0), sem="relaxed")
            tl.atomic_add(counts + 6, unit * unit * tl.sum(made, axis=0), sem="relaxed")
            tl.atomic_add(counts + 7, unit * unit * tl.sum(square, axis=0), sem="relaxed")
            tl.atomic_add(counts + 8, 1.0 * blocks, sem="relaxed")
            tl.atomic_add(counts + 9, tl.sum(full, axis=0), sem="relaxed")
            tl.atomic_add(counts + 10, tl.sum(zero_w, axis=0), sem="relaxed")
            tl.atomic_add(counts + 11, tl.sum(zero_m, axis=0), sem="relaxed")
            tl.atomic_add(counts + 12, tl.sum(zero_v, axis=0), sem="relaxed")
        tl.atomic_add(counts + 1, tl.sum(tl.sum(squares, axis=1), axis=0) / (m_in * m_in), sem="relaxed")
        tl.atomic_max(counts, tl.max(largest, axis=0) / step, sem="relaxed")
