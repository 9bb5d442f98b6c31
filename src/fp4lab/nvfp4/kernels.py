"""Triton kernels of the number format, held to `codec`. The only file that imports Triton; others take it from here.

Bit-equal to the codec on the GPU (tests/gpu/test_kernels.py). Decoding moves bits: the three bits of an E2M1 magnitude become
exponent and mantissa of an fp32 number (subnormal for code 1, which the multiplication by 2^126 makes 0.5 exactly).
"""

import functools

import torch
from torch import Tensor

from fp4lab.nvfp4.packed import BLOCK, PackedTensor, matrix_shape

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs brings no Triton
    triton = None
try:
    from triton import constexpr_function
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2
except ImportError:  # older ones have no Gluon, or another
    gl = gluon = mma_v2 = constexpr_function = None

WORDS = 512  # 32-bit words, of eight codes each, that one program decodes


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return triton is not None and device.type == "cuda"


def describe(device: torch.device) -> str:
    """Which path decodes and encodes on this device, for the records."""
    if available(device):
        return f"NVFP4 is decoded by Triton {triton.__version__} kernels"
    why = "the device is no GPU" if device.type != "cuda" else "Triton is not installed (pip install triton)"
    return f"NVFP4 is decoded by plain torch operations: {why}"


def unpack(p: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`codec.unpack` in one pass: codes and scales are read once, values written once."""
    rows, cols = matrix_shape(p.shape)
    padded = p.codes.shape[1] * 2
    out = torch.empty(rows, padded, dtype=dtype, device=p.device)
    words = rows * padded // 8
    if words:
        g = p.global_scale
        levels = 0 if g is None else 1 + g.ndim // 2
        _unpack[(-(-words // WORDS),)](
            p.codes, p.block_scale, out if g is None else g, out, words, padded // 8, levels, p.divide, WORDS, num_warps=4
        )
    if cols != padded:
        out = out[:, :cols]
    return out if out.shape == p.shape else out.reshape(p.shape)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts fp32 [P, ...] -> their sum [...] in `dtype`, rounded once, always added in the same order."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    rows = min(64, 1 << (len(parts) - 1).bit_length())  # of a tile of 2048
    _sum_parts[(-(-out.numel() * rows // 2048),)](parts, out, out.numel(), len(parts), rows, 2048 // rows, num_warps=4)
    return out


assert BLOCK == 16, "two words share a block scale"

if triton is not None:

    @triton.jit
    def _e4m3(byte):
        """uint8 -> fp32; 0x7F and 0xFF are NaN."""
        bits = byte.to(tl.int32)
        exponent, mantissa = (bits >> 3) & 15, bits & 7
        normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
        size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
        size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
        signed = size.to(tl.int32, bitcast=True) | ((bits & 0x80) << 24)  # -0.0 keeps its sign
        return signed.to(tl.float32, bitcast=True)

    @triton.jit
    def positive_scale(byte):
        """E4M3 bytes 0..0x7E as int32 -> fp32."""
        normal = ((byte << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        return tl.where(byte < 8, byte.to(tl.float32) * 0.001953125, normal)

    @triton.jit
    def floor_scale(x):
        """The byte, as int32, of the largest E4M3 number that is at most x >= 0; beyond 448 it is no E4M3 byte."""
        return tl.where(x < 0.015625, (x * 512.0).to(tl.int32), (x.to(tl.int32, bitcast=True) >> 20) - (120 << 3))

    @triton.jit
    def decode_tiny(word, lane):
        """Words [N] of eight codes -> [N, 8] fp32, 2^-126 of their values; lane = 0..7."""
        top = word[:, None] << (28 - 4 * lane)[None, :]  # the shift that keeps the sign takes the magnitude to 22..24
        return ((top >> 6) & -2118123520).to(tl.float32, bitcast=True)  # 0x81C00000

    @triton.jit
    def decode_root(word, lane):
        """Words [N] of eight codes without a sign -> [N, 8] fp32, a code 0 as a quarter: those of sqrt(v) (`train.state`).

        A byte permutation looks up four at once: the upper bytes of their values in half precision. The lanes are not read;
        without them Triton would compute the first and take it for all.
        """
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, lo, hi; .reg .b16 x0, x1, x2, x3, x4, x5, x6, x7;
            and.b32 a, $8, 0x77777777; shr.u32 b, a, 16; mov.b32 lo, 0x3E3C3834; mov.b32 hi, 0x46444240;
            prmt.b32 a, lo, hi, a; prmt.b32 b, lo, hi, b;
            prmt.b32 lo, a, 0, 0x1404; prmt.b32 hi, a, 0, 0x3424; mov.b32 {x0, x1}, lo; mov.b32 {x2, x3}, hi;
            prmt.b32 lo, b, 0, 0x1404; prmt.b32 hi, b, 0, 0x3424; mov.b32 {x4, x5}, lo; mov.b32 {x6, x7}, hi;
            cvt.f32.f16 $0, x0; cvt.f32.f16 $1, x1; cvt.f32.f16 $2, x2; cvt.f32.f16 $3, x3;
            cvt.f32.f16 $4, x4; cvt.f32.f16 $5, x5; cvt.f32.f16 $6, x6; cvt.f32.f16 $7, x7; }""",
            "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [word[:, None], lane[None, :]],
            dtype=tl.float32,
            is_pure=True,
            pack=8,
        )

    @triton.jit
    def _keep(a, b):
        return a

    @triton.jit
    def join(t):
        """The top four bits of t [N, 8] -> words [N]. A funnel shift puts each nibble under those before it."""
        word = tl.inline_asm_elementwise(
            """{ .reg .b32 a;
            shf.l.wrap.b32 a, $15, $15, 4; shf.l.wrap.b32 a, $14, a, 4; shf.l.wrap.b32 a, $13, a, 4;
            shf.l.wrap.b32 a, $12, a, 4; shf.l.wrap.b32 a, $11, a, 4; shf.l.wrap.b32 a, $10, a, 4;
            shf.l.wrap.b32 a, $9, a, 4; shf.l.wrap.b32 $0, $8, a, 4;
            mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; mov.b32 $4, 0; mov.b32 $5, 0; mov.b32 $6, 0; mov.b32 $7, 0; }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r",
            [t],
            dtype=tl.int32,
            is_pure=True,
            pack=8,
        )
        return tl.reduce(word, 1, _keep)  # the other seven are 0, and nothing is read of them

    @triton.jit
    def join_signed(t, x):
        """Codes in bits 28..30 of t, whose bit 31 is 0, and the signs of x, fp32, both [N, 8] -> words [N]."""
        return join(t | (x.to(tl.int32, bitcast=True) & -2147483648))

    @triton.jit
    def _sum_parts(parts, out, size, count, R: tl.constexpr, N: tl.constexpr):
        at, part = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, R)
        total = tl.zeros((R, N), tl.float32)
        for start in range(0, count, R):
            inside = (start + part < count)[:, None] & (at < size)[None, :]
            total += tl.load(parts + (start + part).to(tl.int64)[:, None] * size + at[None, :], mask=inside, other=0.0)
        tl.store(out + at, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=at < size)

    @triton.jit
    def mix(x):
        """`train.noise.mix` of uint32."""
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def _unpack(codes, scales, second, out, words, row_words, LEVELS: tl.constexpr, DIVIDE: tl.constexpr, WORDS: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
        inside = at < words
        word = tl.load(codes.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
        scale = _e4m3(tl.load(scales.to(tl.pointer_type(tl.uint8)) + at // 2, mask=inside, other=0))
        if LEVELS == 1:
            g = tl.load(second)
        if LEVELS == 2:
            g = tl.load(second + at // row_words, mask=inside, other=1.0)
        if LEVELS > 0:
            scale = tl.math.div_rn(scale, g) if DIVIDE else scale * g
        lane = tl.arange(0, 8)
        code = word[:, None] >> (4 * lane)[None, :]
        bits = ((code & 7) << 22) | ((code & 8) << 28)
        unit = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
        value = unit * scale[:, None]
        tl.store(out + at[:, None] * 8 + lane[None, :], value.to(out.dtype.element_ty), mask=inside[:, None])
