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
    from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

    # names from Triton 3.7 and 3.9 on, and those of before
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    async_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
except ImportError:  # older ones have no Gluon, or another
    gl = gluon = mma_v2 = async_copy = async_load = barrier = constexpr_function = None

WORDS = 512  # 32-bit words, of eight codes each, that one program decodes


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return triton is not None and device.type == "cuda"


@functools.cache
def too_old(device: torch.device, needed: tuple[int, int], what: str) -> str | None:
    """Why a kernel with `what` does not run on this CUDA device, or None."""
    has = torch.cuda.get_device_capability(device)
    if has >= needed:
        return None
    return f"compute capability {has[0]}.{has[1]} has no {what}: {needed[0]}.{needed[1]} does"


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
    rows = min(256, 1 << (len(parts) - 1).bit_length())  # of a tile of 2048
    _sum_parts[(-(-out.numel() * rows // 2048),)](parts, out, out.numel(), len(parts), rows, 2048 // rows, num_warps=4)
    return out


def pair_rows(x: Tensor, out: Tensor) -> None:
    """x [n, cols] bf16 -> out [pairs, cols, 2]: rows 2 p and 2 p + 1 side by side, zeros beyond n."""
    n, cols = x.shape
    _pair_rows[(-(-cols // 1024), len(out))](x, out, n, cols, C=1024, num_warps=4)


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
    def _sum_parts(parts, out, size, count, R: tl.constexpr, N: tl.constexpr):
        at, part = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, R)
        total = tl.zeros((R, N), tl.float32)
        for start in range(0, count, R):
            inside = (start + part < count)[:, None] & (at < size)[None, :]
            total += tl.load(parts + (start + part).to(tl.int64)[:, None] * size + at[None, :], mask=inside, other=0.0)
        tl.store(out + at, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=at < size)

    @triton.jit(do_not_specialize=["n"])
    def _pair_rows(x, out, n, cols, C: tl.constexpr):
        at, row = tl.program_id(0) * C + tl.arange(0, C), 2 * tl.program_id(1)
        first = tl.load(x + row * cols + at, mask=(at < cols) & (row < n), other=0.0)
        second = tl.load(x + (row + 1) * cols + at, mask=(at < cols) & (row + 1 < n), other=0.0)
        both = (tl.program_id(1) * cols + at)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(out + both, tl.join(first, second), mask=(at < cols)[:, None])

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
