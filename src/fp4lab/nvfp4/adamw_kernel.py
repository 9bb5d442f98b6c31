"""One AdamW update of packed rows in one pass on the GPU: reads g, w, m, v and writes w, m, v with their scales.

`train.adamw.update_rows` is its definition, of which it is a reordering: approximate reciprocals and square roots, fused
multiply-adds, and every value inside 2^-10 of itself, so that the 2^126 of `assembly.ENCODE` can be part of a scale's inverse.
Codes may therefore differ where a value lies within a few ulps of the border between two; tests/gpu/test_adamw_kernel.py bounds
their share. The same call gives the same bits. Where the gradient is a product of few tokens, `adamw_product` makes it too.

A program is one warp and takes a row from left to right, a block of 16 a thread: first for the row's largest gradient, which
the moments' second level needs, then for the update. It is bound by instructions, not by memory (doc/benchmarks.md).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4lab.nvfp4 import kernels
from fp4lab.nvfp4.packed import BLOCK, PackedTensor
from fp4lab.nvfp4.update import MOMENT_LANES, SECOND_WORD

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
    from fp4lab.nvfp4 import assembly
    from fp4lab.nvfp4.kernels import mix, tl, triton

    _DECODE, _SQUARE, _DECODED = map(tl.constexpr, (assembly.DECODE, assembly.SQUARE, assembly.DECODED))
    _ENCODE, _ENCODE_UNSIGNED = tl.constexpr(assembly.ENCODE), tl.constexpr(assembly.ENCODE_UNSIGNED)
    _ENCODE_DITHERED, _ENCODED = tl.constexpr(assembly.ENCODE_DITHERED), tl.constexpr(assembly.ENCODED)
    _CAP, _CAPPED, _RESCALE, _RESCALED = map(tl.constexpr, (assembly.CAP, assembly.CAPPED, assembly.RESCALE, assembly.RESCALED))
    _SCALE, _SCALED, _NOISE = map(tl.constexpr, (assembly.SCALE, assembly.SCALED, assembly.NOISE))
    _M_LANE, _M_SCALE_LANE, _V_LANE, _V_SCALE_LANE = map(tl.constexpr, MOMENT_LANES)
    _HALF, _SECOND_WORD = tl.constexpr(assembly.HALF), tl.constexpr(SECOND_WORD)
    _TINY = tl.constexpr(2.0**-10)  # what everything is of itself inside
    _UP = tl.constexpr(2.0**4)  # of decoded codes, which are 2^-14 of their values
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
    def _keep(a, b):
        return a

    @triton.jit
    def _scale(byte):
        """E4M3 bytes 0..0x7E -> fp32."""
        return byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)

    @triton.jit
    def _values(word, lane, TEXT: tl.constexpr):
        """Words [N] of eight codes -> [N, 8] fp32; lane = 0..7 is not read, but gives the shape."""
        return tl.inline_asm_elementwise(TEXT, _DECODED, [word[:, None], lane[None, :]], dtype=tl.float32, is_pure=True, pack=8)

    @triton.jit
    def _word(x, inverse, add, TEXT: tl.constexpr):
        """Values [N, 8], the inverse of their block's scale and what to add [N] -> words [N]."""
        word = tl.inline_asm_elementwise(
            TEXT, _ENCODED, [x, inverse[:, None], add[:, None]], dtype=tl.int32, is_pure=True, pack=8
        )
        return tl.reduce(word, 1, _keep)

    @triton.jit
    def _cap(x, most, limit, top):
        return tl.inline_asm_elementwise(
            _CAP, _CAPPED, [x, most[:, None], limit[:, None], top[:, None]], dtype=tl.float32, is_pure=True, pack=8
        )

    @triton.jit
    def _stored(x0, x1, hash, bound, places, bytes, at, ok, OWN: tl.constexpr, SCALES: tl.constexpr, TEXT: tl.constexpr):
        """Writes a moment's blocks as `nvfp4.pack_stochastic` does, and returns the bytes of their scales."""
        amax = _block_max(tl.abs(x0), tl.abs(x1))
        sixth = tl.where(bound > 0, 1 / (6 * bound), 0.0)  # a scale of 0 says that all is 0
        least = tl.where(bound > 0, 512 * _DOWN / bound, 0.0)
        fraction = ((hash * SCALES) >> 12).to(tl.int32, bitcast=True)
        byte = tl.inline_asm_elementwise(_SCALE, _SCALED, [amax * sixth, fraction], dtype=tl.int32, is_pure=True, pack=1)
        noise = ((hash * OWN) >> 4).to(tl.int32, bitcast=True) & _NOISE
        inverse = tl.minimum(_reciprocal(amax) * (6 * _DOWN), least)
        tl.store(bytes + at, byte.to(tl.uint8), mask=ok)
        tl.store(places + at * 2, _word(x0, inverse, noise, TEXT), mask=ok)
        tl.store(places + at * 2 + 1, _word(x1, inverse, noise, TEXT), mask=ok)
        return byte

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
        half_step = tl.full((C,), _HALF, tl.int32)
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
            m_old, v_old = m_old * beta1 * _UP, v_old * root_beta2 * v_root
            m_new, v_new = m_new * _TINY, v_new * v_root
        unit = 1024.0  # what a weight is inside, times this, is the weight: it stays in units of its second level
        if SECOND == 1:
            unit *= tl.load(wg)
        if SECOND == 2:
            unit /= tl.load(wg)
        step = tl.maximum(lr / unit, 1e-30)  # part of the update's denominator; nothing moves by the least of it
        eps_in, root_in, cap = eps_in / step, root_in / step, cap * step
        keep = (1 - lr * decay) * _UP
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
                m_scale = (_scale(tl.load(ms + at, mask=ok, other=0)) * m_old)[:, None]
                v_scale = _scale(tl.load(vs + at, mask=ok, other=0)) * v_old
                v_scale = (v_scale * v_scale)[:, None]
                m0 = _values(m0, lane, _DECODE) * m_scale + g0
                m1 = _values(m1, lane, _DECODE) * m_scale + g1
                v0 = _values(v0, lane, _SQUARE) * v_scale + g0 * g0
                v1 = _values(v1, lane, _SQUARE) * v_scale + g1 * g1
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
            hash = mix((first.to(tl.int64) * blocks + start + block).to(tl.uint32) ^ key) & 0xFFFFF000
            scale = _scale(byte)
            n0 = _values(w0, lane, _DECODE) * (scale * keep)[:, None] - u0
            n1 = _values(w1, lane, _DECODE) * (scale * keep)[:, None] - u1

            if PACKED:
                m_byte = _stored(m0, m1, hash, m_new, mc, ms, at, ok, _M_LANE, _M_SCALE_LANE, _ENCODE)
                v_byte = _stored(q0, q1, hash, v_new, vc, vs, at, ok, _V_LANE, _V_SCALE_LANE, _ENCODE_UNSIGNED)
            else:
                tl.store(mc + values, (m0 * 1024.0).to(mc.dtype.element_ty), mask=inside)
                tl.store(mc + 8 + values, (m1 * 1024.0).to(mc.dtype.element_ty), mask=inside)
                tl.store(vc + values, (v0 * (rest2 / (m_in * m_in))).to(vc.dtype.element_ty), mask=inside)
                tl.store(vc + 8 + values, (v1 * (rest2 / (m_in * m_in))).to(vc.dtype.element_ty), mask=inside)

            amax = tl.reduce(_max_or_nan(tl.abs(n0), tl.abs(n1)), 1, _max_or_nan) * 1024
            if STOCHASTIC:
                new_byte, new_scale, most, limit = tl.inline_asm_elementwise(
                    _RESCALE, _RESCALED, [amax, byte, scale, hash.to(tl.int32, bitcast=True)],
                    dtype=(tl.int32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
                )  # fmt: skip
                inverse = tl.where(new_byte > 0, _reciprocal(new_scale) * (1024 * _DOWN), 0.0)
                most, limit, top = most * _TINY, limit * _TINY, new_scale * (6 * _TINY)
                other = (hash * _SECOND_WORD).to(tl.int32, bitcast=True)
                w0_new = _word(_cap(n0, most, limit, top), inverse, hash.to(tl.int32, bitcast=True), _ENCODE_DITHERED)
                w1_new = _word(_cap(n1, most, limit, top), inverse, other, _ENCODE_DITHERED)
            else:
                rounded = tl.minimum(tl.maximum(amax * (1 / 6), LEAST), 448.0).to(tl.float8e4nv)
                new_byte, new_scale = rounded.to(tl.uint8, bitcast=True).to(tl.int32), rounded.to(tl.float32)
                inverse, most = _reciprocal(new_scale) * (1024 * _DOWN), new_scale * (6 * _TINY)
                w0_new = _word(_cap(n0, most, most, most), inverse, half_step, _ENCODE)
                w1_new = _word(_cap(n1, most, most, most), inverse, half_step, _ENCODE)
            tl.store(wc + at * 2, w0_new, mask=ok)
            tl.store(wc + at * 2 + 1, w1_new, mask=ok)
            tl.store(ws + at, tl.where(amax < float("inf"), new_byte, 0x7F).to(tl.uint8), mask=ok)
            if COUNT:
                old, new = (scale * _UP)[:, None], (new_scale * _UP)[:, None]
                rescaled = new_byte != byte
                total = _count(total, _values(w0, lane, _DECODE) * old, n0, _values(w0_new, lane, _DECODE) * new, rescaled, ok)
                total = _count(total, _values(w1, lane, _DECODE) * old, n1, _values(w1_new, lane, _DECODE) * new, rescaled, ok)
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
