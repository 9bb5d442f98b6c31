"""One AdamW update of packed rows in one pass on the GPU: reads g, w, m, v and writes w, m, v with their scales.

`train.adamw.update_rows` is its definition, of which it is a reordering: approximate reciprocals and square roots, fused
multiply-adds, and every value inside 2^-10 of itself, so that the 2^126 of `assembly.ENCODE` can be part of a scale's inverse.
Codes may therefore differ where a value lies within a few ulps of the border between two; tests/gpu/test_adamw_kernel.py bounds
their share. The same call gives the same bits. Where the gradient is a product of few tokens, `adamw_product` makes it too.

A program takes a row from left to right, a block of 16 a thread: first for the row's largest gradient, which the moments'
second level needs, then for the update. It is bound by instructions, not by memory (doc/benchmarks.md): hence the assembly,
and lines of the next tile asked for while this one is computed. Loads into shared memory ahead were slower.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4lab.nvfp4 import kernels
from fp4lab.nvfp4.adamw_blocks import SMALL
from fp4lab.nvfp4.packed import BLOCK, PackedTensor

TILE = 32  # blocks of a row that a warp holds at a time
REGS = {1: 88, 4: 80}  # of a thread, by the warps of a program
FEW, LONG = 4096, 4096  # rows that hardly fill the device once, each of which is enough for four warps
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
    names: Tensor | None = None,
) -> None:
    """Updates rows in place. grad [rows, cols]; w, m, v the same rows, m and v two-level packed or floats.

    numbers  fp32 [NUMBERS] on the device: read when the kernel runs, so a captured graph follows them
    counts   fp32 [SPREAD, len(COUNTS)] on the device, zeros at first: added to (largest: maximum)
    count    whether what follows "squares" is counted too; it costs a third of the time more
    tensor   which field of the dither; first: the matrix row that grad's row 0 is
    borders  rows from the first on are of the tensor after it, beginning anew; from the second on of the one after that
    names    int32 [rows]: which row of w, m and v each row of grad is for; nothing happens to one that is for a negative
    """
    rows, cols = grad.shape
    assert cols % BLOCK == 0 and grad.is_contiguous()
    second, warps = w.global_scale, _warps(rows, cols)
    decays = c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2
    inside = c.beta1 / decays[1], c.beta2**0.5 / decays[3] ** 0.5, 1 / decays[1], 1 / decays[3] ** 0.5
    _adamw[(rows,)](
        *(grad, *_parts(w), counts if second is None else second, *_moment(m), *_moment(v), numbers, counts),
        *(counts if names is None else names, cols // BLOCK, first, tensor, *borders),
        *(*decays, *(x * SMALL for x in inside), c.eps * SMALL, c.weight_decay, c.max_update or 0.0),
        CAP=c.max_update is not None,
        STOCHASTIC=c.stochastic,
        LEAST=2.0**-6 if c.rule == "torchao" else 2.0**-9,
        SECOND=0 if second is None else 2 if w.divide else 1,
        PACKED=isinstance(m, PackedTensor),
        COUNT=count,
        NAMED=names is not None,
        WHOLE=cols % (BLOCK * TILE * warps) == 0,
        C=TILE * warps,
        num_warps=warps,
        maxnreg=REGS[warps],
    )


def _warps(rows: int, cols: int) -> int:
    """Of a program. Rows that are few begin and end together: then nothing is computed while the first of them are read."""
    lanes = 4 * TILE * BLOCK
    return 4 if rows <= FEW and cols >= LONG and -(-cols // lanes) * lanes <= 1.06 * cols else 1


def _parts(p: PackedTensor) -> tuple[Tensor, Tensor]:
    """A block's codes are one int64."""
    return p.codes.view(torch.int64), p.block_scale.view(torch.uint8)


def _moment(m: "PackedTensor | Tensor") -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(m, PackedTensor):
        return m, m, m
    assert m.global_scale is not None
    return *_parts(m), m.global_scale


if kernels.triton is not None:
    from fp4lab.nvfp4.adamw_blocks import (
        CODE,
        DECODE,
        DOWN,
        ENCODE,
        ENCODE_DITHERED,
        ENCODE_UNSIGNED,
        HALF,
        M_LANE,
        M_SCALE_LANE,
        OTHER_WORD,
        RESCALE,
        RESCALED,
        SQUARE,
        TINY,
        UP,
        V_LANE,
        V_SCALE_LANE,
        add_counts,
        approx_reciprocal,
        approx_sqrt,
        block_max,
        cap_block,
        decode,
        e4m3,
        encode,
        join_words,
        lines_of_tile,
        max_or_nan,
        prefetch,
        row_max,
        small_gradient,
        split_words,
        store_moment,
        tile_mask,
    )
    from fp4lab.nvfp4.kernels import mix, tl, triton

    @triton.jit(do_not_specialize=["first", "tensor", "border1", "border2"])
    def _adamw(
        g_ptr, wc, ws, wg, mc, ms, mg, vc, vs, vg, numbers, counts, names,
        blocks, first, tensor, border1, border2,
        beta1, rest1, beta2, rest2, m_keep, v_keep, m_in, v_in, eps, decay, cap,
        CAP: tl.constexpr, STOCHASTIC: tl.constexpr, LEAST: tl.constexpr, SECOND: tl.constexpr, PACKED: tl.constexpr,
        COUNT: tl.constexpr, NAMED: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        given = row  # the gradient's; of the state it may be another
        if NAMED:
            row = tl.load(names + given)
            if row < 0:
                return
        counts += (row % 32) * 13
        block = tl.arange(0, C)
        lane = tl.arange(0, 8)
        values = block[:, None] * 16 + lane[None, :]
        half_step = tl.full((C,), HALF, tl.int32)
        lr, c1, c2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
        tensor += (row >= border1).to(tl.int32) + (row >= border2).to(tl.int32)
        first += row - tl.where(row >= border2, border2, tl.where(row >= border1, border1, 0))
        key = mix(tl.load(numbers + 3).to(tl.uint32, bitcast=True) + tensor.to(tl.uint32))
        counter = first * blocks
        g_ptr += given.to(tl.int64) * blocks * 16
        origin = row.to(tl.int64) * blocks
        wc, ws = wc + origin, ws + origin
        if PACKED:
            mc, ms, vc, vs = mc + origin, ms + origin, vc + origin, vs + origin
        else:
            mc, vc = mc + origin * 16, vc + origin * 16

        # Inside, moments are of gradients 2^-10 of themselves and lack their factors rest1 and rest2: a gradient has no other.
        # What makes them so, of the square root of v, is m_in and v_in; with the decay of old ones, m_keep and v_keep.
        m_old, v_old = m_keep, v_keep * v_keep
        if PACKED:  # their second levels, before and after
            m_old, v_old = tl.load(mg + row), tl.load(vg + row)
            place, far, from_block = lines_of_tile(wc, ws, mc, ms, vc, vs, C)
            prefetch(place, from_block < blocks)
            unit = row_max(g_ptr, blocks, WHOLE, C) * (1.0 / 2688.0)
            m_new = m_old * beta1 + unit * rest1
            v_new = tl.sqrt(v_old * v_old * beta2 + unit * unit * rest2)
            tl.store(mg + row, m_new)
            tl.store(vg + row, v_new)
            m_old, v_old = m_old * (m_keep * CODE), v_old * v_keep
            m_new, v_new = m_new * m_in, v_new * v_in

        unit = 1024.0  # what a weight is inside, times this, is the weight: it stays in units of its second level
        if SECOND == 1:
            unit *= tl.load(wg)
        if SECOND == 2:
            unit *= approx_reciprocal(tl.load(wg))
        # update = m c1 / (sqrt(v c2) + eps), of which the step is the part lr / unit
        per_step = tl.minimum(unit * approx_reciprocal(lr), 1e30)
        over = per_step * approx_reciprocal(rest1 * c1)
        root_in, eps_in = approx_sqrt(rest2 * c2) * over, eps * over
        cap *= approx_reciprocal(per_step)
        keep = (1 - lr * decay) * UP
        largest = tl.zeros((C,), tl.float32)
        squares = tl.zeros((C,), tl.float32)
        none = tl.zeros((C,), tl.float32)
        total, full, zero_w, zero_m, zero_v = (none, none, none, none, none), none, none, none, none
        for start in range(0, blocks, C):
            ok = tile_mask(start, blocks, WHOLE, C)
            inside = ok[:, None]
            g0 = small_gradient(tl.load(g_ptr + start * 16 + values, mask=inside, other=0.0))
            g1 = small_gradient(tl.load(g_ptr + start * 16 + 8 + values, mask=inside, other=0.0))
            w0, w1 = split_words(tl.load(wc + start + block, mask=ok, other=0))
            byte = tl.load(ws + start + block, mask=ok, other=0).to(tl.int32)
            square0, square1 = g0 * g0, g1 * g1
            squares += tl.sum(square0 + square1, axis=1)
            if PACKED:
                place += far
                prefetch(place, from_block < blocks - start - C)
                m0, m1 = split_words(tl.load(mc + start + block, mask=ok, other=0))
                v0, v1 = split_words(tl.load(vc + start + block, mask=ok, other=0))
                m_scale = (e4m3(tl.load(ms + start + block, mask=ok, other=0)) * m_old)[:, None]
                v_scale = e4m3(tl.load(vs + start + block, mask=ok, other=0)) * v_old
                v_scale = (v_scale * v_scale)[:, None]
                m0 = decode(m0, lane, DECODE) * m_scale + g0
                m1 = decode(m1, lane, DECODE) * m_scale + g1
                v0 = decode(v0, lane, SQUARE) * v_scale + square0
                v1 = decode(v1, lane, SQUARE) * v_scale + square1
            else:
                m0 = tl.load(mc + start * 16 + values, mask=inside, other=0.0).to(tl.float32) * m_old + g0
                m1 = tl.load(mc + start * 16 + 8 + values, mask=inside, other=0.0).to(tl.float32) * m_old + g1
                v0 = tl.load(vc + start * 16 + values, mask=inside, other=0.0).to(tl.float32) * v_old + square0
                v1 = tl.load(vc + start * 16 + 8 + values, mask=inside, other=0.0).to(tl.float32) * v_old + square1
            q0, q1 = approx_sqrt(v0), approx_sqrt(v1)
            u0, u1 = m0 * approx_reciprocal(q0 * root_in + eps_in), m1 * approx_reciprocal(q1 * root_in + eps_in)
            if CAP:
                u0 = tl.minimum(tl.maximum(u0, -cap), cap)
                u1 = tl.minimum(tl.maximum(u1, -cap), cap)
            largest = tl.maximum(largest, block_max(tl.abs(u0), tl.abs(u1)))
            hash = mix((counter + start + block).to(tl.uint32, bitcast=True) ^ key) & 0xFFFFF000
            if PACKED:
                m_byte = store_moment(m0, m1, hash, m_new, mc, ms, start + block, ok, M_LANE, M_SCALE_LANE, ENCODE)
                v_byte = store_moment(q0, q1, hash, v_new, vc, vs, start + block, ok, V_LANE, V_SCALE_LANE, ENCODE_UNSIGNED)
            else:
                m_real, v_real = rest1 / TINY, rest2 / (TINY * TINY)
                tl.store(mc + start * 16 + values, (m0 * m_real).to(mc.dtype.element_ty), mask=inside)
                tl.store(mc + start * 16 + 8 + values, (m1 * m_real).to(mc.dtype.element_ty), mask=inside)
                tl.store(vc + start * 16 + values, (v0 * v_real).to(vc.dtype.element_ty), mask=inside)
                tl.store(vc + start * 16 + 8 + values, (v1 * v_real).to(vc.dtype.element_ty), mask=inside)

            scale = e4m3(byte)
            n0 = decode(w0, lane, DECODE) * (scale * keep)[:, None] - u0
            n1 = decode(w1, lane, DECODE) * (scale * keep)[:, None] - u1
            amax = tl.reduce(max_or_nan(tl.abs(n0), tl.abs(n1)), 1, max_or_nan) * 1024
            if STOCHASTIC:
                new_byte, new_scale, most, limit = tl.inline_asm_elementwise(
                    RESCALE, RESCALED, [amax, byte, scale, hash.to(tl.int32, bitcast=True)],
                    dtype=(tl.int32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
                )  # fmt: skip
                inverse = tl.where(new_byte > 0, approx_reciprocal(new_scale) * (1024 * DOWN), 0.0)
                most, limit, top = most * TINY, limit * TINY, new_scale * (6 * TINY)
                other = (hash * OTHER_WORD).to(tl.int32, bitcast=True)
                w0_new = encode(cap_block(n0, most, limit, top), inverse, hash.to(tl.int32, bitcast=True), ENCODE_DITHERED)
                w1_new = encode(cap_block(n1, most, limit, top), inverse, other, ENCODE_DITHERED)
            else:
                rounded = tl.minimum(tl.maximum(amax * (1 / 6), LEAST), 448.0).to(tl.float8e4nv)
                new_byte, new_scale = rounded.to(tl.uint8, bitcast=True).to(tl.int32), rounded.to(tl.float32)
                inverse, most = approx_reciprocal(new_scale) * (1024 * DOWN), new_scale * (6 * TINY)
                w0_new = encode(cap_block(n0, most, most, most), inverse, half_step, ENCODE)
                w1_new = encode(cap_block(n1, most, most, most), inverse, half_step, ENCODE)
            tl.store(wc + start + block, join_words(w0_new, w1_new), mask=ok)
            tl.store(ws + start + block, tl.where(amax < float("inf"), new_byte, 0x7F).to(tl.uint8), mask=ok)
            if COUNT:
                old, new = (scale * UP)[:, None], (new_scale * UP)[:, None]
                rescaled = new_byte != byte
                total = add_counts(total, decode(w0, lane, DECODE) * old, n0, decode(w0_new, lane, DECODE) * new, rescaled, ok)
                total = add_counts(total, decode(w1, lane, DECODE) * old, n1, decode(w1_new, lane, DECODE) * new, rescaled, ok)
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
        tl.atomic_add(counts + 1, tl.sum(squares, axis=0) / (TINY * TINY), sem="relaxed")
        tl.atomic_max(counts, tl.max(largest, axis=0) * per_step, sem="relaxed")
