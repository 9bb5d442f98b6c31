"""Products of a few rows with a packed matrix that decode it on the way: it is read once, and never exists in bf16.

What unpack and a library's product do in two kernels and 9 bytes a weight, in one and 0.56. A code times its block scale has
six significant bits, so in bf16 it is exact; a matrix's second-level scale multiplies the sums, which are fp32. The result is
that of the unpacked product but for the order of its sums (tests/gpu/test_product_kernel.py).

A thread holds codes where the matrix units want them: eight (forward) or sixteen (backward) of a row lie in consecutive bytes,
and which index of the contraction or of the output they stand for is for us to choose. Hence Gluon, Triton's dialect with
explicit layouts.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fp4lab.nvfp4 import kernels
from fp4lab.nvfp4.packed import PackedTensor

TOKENS = 16  # rows of x up to which this is faster than decoding first (doc/benchmarks.md)
ROWS, CHUNK = 16, 128  # of the matrix a warp takes at once in the forward
COLS, STEP = 128, 16  # and in the backward
WARPS = 4  # of a program; they share out the contraction
FLIGHT = 5
PROGRAMS = 132 * 2  # about how many the backward is split into


def why_not(p: PackedTensor, dtype: torch.dtype, n: int = 1) -> str | None:
    """Why n rows of this dtype and p [rows, cols] are not multiplied here, or None."""
    rows, cols = p.shape
    if n > TOKENS:
        return f"{n} rows are many: decoding first is as fast"
    if not kernels.available(p.device):
        return "the device is no GPU with Triton"
    if kernels.gl is None:
        return "this Triton has no Gluon"
    if old := kernels.too_old(p.device, (9, 0), "products of pairs of bfloat16"):
        return old
    if dtype != torch.bfloat16:
        return f"it is for bfloat16, not {dtype}"
    if p.levels == "row":
        return "its second-level scale is per row"
    if cols % CHUNK or rows % ROWS:
        return f"{rows} x {cols} is not whole tiles of {ROWS} x {CHUNK}"
    return None


def describe(matrices: Iterable[PackedTensor], dtype: torch.dtype) -> str:
    """Which path products of few rows take, for the records."""
    reasons = [why_not(p, dtype) for p in matrices]
    why = sorted({r for r in reasons if r is not None})
    text = f"products of up to {TOKENS} rows decode on the way with {reasons.count(None)} of {len(reasons)} matrices"
    return text + "".join(f"; else they decode first: {w}" for w in why)


def product(x: Tensor, p: PackedTensor) -> Tensor:
    """x [n, cols] bf16 times the transpose of p [rows, cols] -> [n, rows] bf16. For n <= TOKENS."""
    n, cols = x.shape
    rows = p.shape[0]
    out = torch.empty(n, rows, dtype=x.dtype, device=x.device)
    lanes, flight = _pad(n), _flight(cols // CHUNK)
    _forward[(rows // ROWS,)](
        *(x, *_parts(p), out, n, rows, cols, _levels(p), lanes, WARPS, flight, *_forward_layouts(lanes)), num_warps=WARPS
    )
    return out


def product_back(dy: Tensor, p: PackedTensor) -> Tensor:
    """dy [n, rows] bf16 times p [rows, cols] -> [n, cols] bf16. For n <= TOKENS."""
    n, rows = dy.shape
    cols = p.shape[1]
    lanes, tiles, steps = _pad(n), cols // COLS, -(-rows // (STEP * WARPS))
    each = -(-steps // max(1, PROGRAMS // tiles))  # steps of a program
    parts = -(-steps // each)
    sums = torch.empty(parts, n, cols, dtype=torch.float32, device=dy.device)
    flight = _flight(each * WARPS)
    _backward[(tiles, parts)](
        *(dy, *_parts(p), sums, n, rows, cols, each, _levels(p), lanes, WARPS, flight, *_backward_layouts(lanes)),
        num_warps=WARPS,
    )
    return kernels.sum_parts(sums, dy.dtype)


def _flight(chunks: int) -> int:
    """How many steps' loads a warp has under way at once: at most FLIGHT, and such that the last round is full."""
    steps = -(-chunks // WARPS)
    return -(-steps // -(-steps // FLIGHT))


def _pad(n: int) -> int:
    return max(8, 1 << (n - 1).bit_length())


def _levels(p: PackedTensor) -> int:
    return 0 if p.global_scale is None else 2 if p.divide else 1


def _parts(p: PackedTensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = p.block_scale.view(torch.uint8)
    return p.codes.view(torch.int32), scale, scale if p.global_scale is None else p.global_scale


def _warp_bases(rank: int) -> list[list[int]]:
    return [[1 << i, *([0] * (rank - 1))] for i in range(WARPS.bit_length() - 1)]


@functools.cache
def _forward_layouts(lanes: int) -> tuple[Any, ...]:
    """Of values [warp, row, quarter, block, half, element], x [warp, token, quarter, element], and the sums.

    Of 16 rows a thread has lane // 4 and 8 beyond, of 128 columns the lane % 4th quarter.
    """
    gl = kernels.gl
    mma = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    quarter, row = [[0, 0, 1], [0, 0, 2]], [[0, 1, 0], [0, 2, 0], [0, 4, 0]]
    own = [*([0, 0, 0, 0, 0, 1 << i] for i in range(3)), [0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 8, 0, 0, 0, 0]]
    values = gl.DistributedLinearLayout(own, _padded(quarter + row, 6), _warp_bases(6), [], [WARPS, 16, 4, 2, 2, 8])
    own = [*([0, 0, 0, 1 << i] for i in range(5)), *([0, 8 << i, 0, 0] for i in range((lanes // 8).bit_length() - 1))]
    x = gl.DistributedLinearLayout(own, _padded(quarter + row, 4), _warp_bases(4), [], [WARPS, lanes, 4, 32])
    return values, x, mma


@functools.cache
def _backward_layouts(lanes: int) -> tuple[Any, ...]:
    """Of values [warp, pair of rows, group, word, element, row of the pair], dy [warp, token, row], and the sums.

    Of 16 rows a thread has 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 with q = lane % 4, of 128 columns the sixteen of group lane // 4.
    """
    gl = kernels.gl
    mma = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    own = [[0, 0, 0, 0, 0, 1], *([0, 0, 0, 0, 1 << i, 0] for i in range(3)), [0, 0, 0, 1, 0, 0], [0, 4, 0, 0, 0, 0]]
    lane = [[0, 1, 0], [0, 2, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    values = gl.DistributedLinearLayout(own, _padded(lane, 6), _warp_bases(6), [], [WARPS, 8, 8, 2, 8, 2])
    own = [[0, 0, 1], [0, 0, 8], *([0, 8 << i, 0] for i in range((lanes // 8).bit_length() - 1))]
    lane = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    dy = gl.DistributedLinearLayout(own, lane, _warp_bases(3), [], [WARPS, lanes, 16])
    return values, dy, mma


def _padded(bases: list[list[int]], rank: int) -> list[list[int]]:
    return [[*b, *([0] * (rank - len(b)))] for b in bases]


if kernels.gl is not None:
    from fp4lab.nvfp4.kernels import constexpr_function, gl, gluon, mma_v2

    @constexpr_function
    def _along(dim, rank, layout):
        """The layout of a line which, expanded along the other dimensions from the first on, has `layout`."""
        for d in reversed(range(rank)):
            if d != dim:
                layout = gl.SliceLayout(d, layout)
        return layout

    @gluon.jit
    def axis_index(SIZE: gl.constexpr, DIM: gl.constexpr, RANK: gl.constexpr, LAYOUT: gl.constexpr):
        """0..SIZE-1 along one dimension of RANK."""
        i = gl.arange(0, SIZE, layout=_along(DIM, RANK, LAYOUT))
        for d in gl.static_range(RANK):
            if d != DIM:
                i = gl.expand_dims(i, d)
        return i

    @gluon.jit
    def _scales(byte):
        """E4M3 bytes -> 2^100 of their values, bf16 twice in 32 bits."""
        value = byte.to(gl.float8e4nv, bitcast=True).to(gl.float32) * 1.2676506002282294e30
        return value.to(gl.bfloat16).to(gl.uint16, bitcast=True).to(gl.int32) * 0x10001

    @gluon.jit
    def _decode_row(word, scale, like):
        """Words of eight codes and their `_scales` -> [.., 8] bf16, 2^-26 of their values: the codes 0, 4, 1, 5, 2, 6, 3, 7.

        The bits of an E2M1 magnitude are those of a bf16 2^-126 as large; two codes that lie 16 bits apart move at once.
        """
        return gl.inline_asm_elementwise(
            """{ .reg .b32 a, b;
            shl.b32 a, $4, 6; shl.b32 b, $4, 12; and.b32 a, a, 0x01C001C0; lop3.b32 a, b, 0x80008000, a, 0xEA;
            mul.bf16x2 $0, a, $12;
            shl.b32 a, $4, 2; shl.b32 b, $4, 8; and.b32 a, a, 0x01C001C0; lop3.b32 a, b, 0x80008000, a, 0xEA;
            mul.bf16x2 $1, a, $12;
            shr.u32 a, $4, 2; shl.b32 b, $4, 4; and.b32 a, a, 0x01C001C0; lop3.b32 a, b, 0x80008000, a, 0xEA;
            mul.bf16x2 $2, a, $12;
            shr.u32 a, $4, 6; and.b32 a, a, 0x01C001C0; lop3.b32 a, $4, 0x80008000, a, 0xEA;
            mul.bf16x2 $3, a, $12; }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [word, scale, like],
            dtype=gl.bfloat16,
            is_pure=True,
            pack=8,
        )

    @gluon.jit
    def _decode_rows(word, scale, like):
        """The same of pairs of rows -> [.., 8, 2], in the order of the codes."""
        return gl.inline_asm_elementwise(
            """{ .reg .b32 a, b, z, s;
            prmt.b32 z, $8, $9, 0x5410; prmt.b32 s, $24, $25, 0x5410;
            shl.b32 a, z, 6; shl.b32 b, z, 12; and.b32 a, a, 0x01C001C0; lop3.b32 a, b, 0x80008000, a, 0xEA;
            mul.bf16x2 $0, a, s;
            shl.b32 a, z, 2; shl.b32 b, z, 8; and.b32 a, a, 0x01C001C0; lop3.b32 a, b, 0x80008000, a, 0xEA;
            mul.bf16x2 $1, a, s;
            shr.u32 a, z, 2; shl.b32 b, z, 4; and.b32 a, a, 0x01C001C0; lop3.b32 a, b, 0x80008000, a, 0xEA;
            mul.bf16x2 $2, a, s;
            shr.u32 a, z, 6; and.b32 a, a, 0x01C001C0; lop3.b32 a, z, 0x80008000, a, 0xEA;
            mul.bf16x2 $3, a, s;
            prmt.b32 z, $8, $9, 0x7632;
            shl.b32 a, z, 6; shl.b32 b, z, 12; and.b32 a, a, 0x01C001C0; lop3.b32 a, b, 0x80008000, a, 0xEA;
            mul.bf16x2 $4, a, s;
            shl.b32 a, z, 2; shl.b32 b, z, 8; and.b32 a, a, 0x01C001C0; lop3.b32 a, b, 0x80008000, a, 0xEA;
            mul.bf16x2 $5, a, s;
            shr.u32 a, z, 2; shl.b32 b, z, 4; and.b32 a, a, 0x01C001C0; lop3.b32 a, b, 0x80008000, a, 0xEA;
            mul.bf16x2 $6, a, s;
            shr.u32 a, z, 6; and.b32 a, a, 0x01C001C0; lop3.b32 a, z, 0x80008000, a, 0xEA;
            mul.bf16x2 $7, a, s;  }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,"
            "r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [word, scale, like],
            dtype=gl.bfloat16,
            is_pure=True,
            pack=16,
        )

    @gluon.jit
    def _forward(
        x_ptr, codes, scales, second, out, n, rows, cols,
        SECOND: gl.constexpr, N: gl.constexpr, W: gl.constexpr, U: gl.constexpr,
        L_VALUES: gl.constexpr, L_X: gl.constexpr, MMA: gl.constexpr,
    ):  # fmt: skip
        first = gl.program_id(0) * 16
        L_CODES: gl.constexpr = gl.SliceLayout(5, L_VALUES)
        L_SCALES: gl.constexpr = gl.SliceLayout(4, L_CODES)
        word = axis_index(4, 2, 5, L_CODES) * 4 + axis_index(2, 3, 5, L_CODES) * 2 + axis_index(2, 4, 5, L_CODES)
        code_at = (first + axis_index(16, 1, 5, L_CODES)) * (cols // 8) + word
        scale_at = axis_index(4, 2, 4, L_SCALES) * 2 + axis_index(2, 3, 4, L_SCALES)
        scale_at = (first + axis_index(16, 1, 4, L_SCALES)) * (cols // 16) + scale_at
        x_at = gl.minimum(axis_index(N, 1, 4, L_X), n - 1) * cols + axis_index(4, 2, 4, L_X) * 32 + axis_index(32, 3, 4, L_X)
        chunk = axis_index(W, 0, 5, L_CODES), axis_index(W, 0, 4, L_SCALES), axis_index(W, 0, 4, L_X)
        acc = gl.zeros((W, 16, N), gl.float32, MMA)
        for start in range(0, cols // 128, W * U):
            flight = ()  # type: Any
            for u in gl.static_range(U):
                # beyond the last column the last is read again, for numbers of x that are 0
                at = start + u * W
                code = gl.load(codes + gl.minimum(at + chunk[0], cols // 128 - 1) * 16 + code_at)
                scale = gl.load(scales + gl.minimum(at + chunk[1], cols // 128 - 1) * 8 + scale_at)
                x = gl.load(x_ptr + (at + chunk[2]) * 128 + x_at, mask=x_at * 0 + at + chunk[2] < cols // 128, other=0.0)
                flight += ((code, scale, x),)
            for u in gl.static_range(U):
                code, scale, x = flight[u]
                scale = gl.expand_dims(gl.expand_dims(_scales(scale), 4), 5)
                w = _decode_row(gl.expand_dims(code, 5), scale, axis_index(8, 5, 6, L_VALUES))
                w = gl.reshape(gl.permute(gl.reshape(w, (W, 16, 4, 4, 8)), (0, 1, 3, 2, 4)), (W, 16, 128))
                x = gl.permute(gl.reshape(x, (W, N, 4, 4, 2, 4)), (0, 3, 2, 5, 4, 1))
                x = gl.reshape(x, (W, 128, N))  # in the order that the codes come in
                w = gl.convert_layout(w, gl.DotOperandLayout(0, MMA, 8))
                acc = mma_v2(w, gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 8)), acc)
        y = _rescaled(gl.sum(acc, axis=0), second, SECOND)
        L: gl.constexpr = y.type.layout
        token = axis_index(N, 1, 2, L)
        at = token * rows + first + axis_index(16, 0, 2, L)
        gl.store(out + at, y.to(gl.bfloat16), mask=at * 0 + token < n)

    @gluon.jit
    def _rescaled(y, second, SECOND: gl.constexpr):
        """By the matrix's second-level scale, and 2^26 that decoding left out."""
        y = y * 67108864.0
        if SECOND == 1:
            y = y * gl.load(second)
        if SECOND == 2:
            y = gl.div_rn(y, gl.load(second) + gl.zeros_like(y))
        return y

    @gluon.jit
    def _backward(
        dy_ptr, codes, scales, second, sums, n, rows, cols, each,
        SECOND: gl.constexpr, N: gl.constexpr, W: gl.constexpr, U: gl.constexpr,
        L_VALUES: gl.constexpr, L_DY: gl.constexpr, MMA: gl.constexpr,
    ):  # fmt: skip
        first = gl.program_id(0) * 128
        part = gl.program_id(1)
        L_CODES: gl.constexpr = gl.SliceLayout(4, L_VALUES)
        L_SCALES: gl.constexpr = gl.SliceLayout(3, L_CODES)
        line = axis_index(W, 0, 5, L_CODES) * 16 + axis_index(8, 1, 5, L_CODES) * 2 + axis_index(2, 4, 5, L_CODES)
        code_at = first // 8 + axis_index(8, 2, 5, L_CODES) * 2 + axis_index(2, 3, 5, L_CODES)
        line_scale = axis_index(W, 0, 4, L_SCALES) * 16 + axis_index(8, 1, 4, L_SCALES) * 2 + axis_index(2, 3, 4, L_SCALES)
        scale_at = first // 16 + axis_index(8, 2, 4, L_SCALES)
        line_dy = axis_index(W, 0, 3, L_DY) * 16 + axis_index(16, 2, 3, L_DY)
        dy_at = gl.minimum(axis_index(N, 1, 3, L_DY), n - 1) * rows
        acc = gl.zeros((W, 128, N), gl.float32, MMA)
        for step in range(part * each, part * each + each, U):
            flight = ()  # type: Any
            for u in gl.static_range(U):
                # beyond the last row the last is read again, for gradients that are 0
                at = (step + u) * 16 * W
                code = gl.load(codes + gl.minimum(at + line, rows - 1) * (cols // 8) + code_at)
                scale = gl.load(scales + gl.minimum(at + line_scale, rows - 1) * (cols // 16) + scale_at)
                inside = (dy_at * 0 + at + line_dy < rows) & (step + u < part * each + each)
                flight += ((code, scale, gl.load(dy_ptr + at + line_dy + dy_at, mask=inside, other=0.0)),)
            for u in gl.static_range(U):
                code, scale, dy = flight[u]
                scale = gl.expand_dims(gl.expand_dims(_scales(scale), 3), 4)
                w = _decode_rows(gl.expand_dims(code, 4), scale, axis_index(8, 4, 6, L_VALUES) + axis_index(2, 5, 6, L_VALUES))
                w = gl.reshape(gl.permute(w, (0, 3, 4, 2, 1, 5)), (W, 128, 16))
                w = gl.convert_layout(w, gl.DotOperandLayout(0, MMA, 2))
                dy = gl.convert_layout(gl.permute(dy, (0, 2, 1)), gl.DotOperandLayout(1, MMA, 2))
                acc = mma_v2(w, dy, acc)
        y = _rescaled(gl.sum(acc, axis=0), second, SECOND)
        L: gl.constexpr = y.type.layout
        token, col = axis_index(N, 1, 2, L), axis_index(128, 0, 2, L)
        col = first + (col % 8) * 16 + col // 8  # a thread's sixteen elements are rows of the sums that lie eight apart
        at = (part * n + token) * cols + col
        gl.store(sums + at, y, mask=at * 0 + token < n)
