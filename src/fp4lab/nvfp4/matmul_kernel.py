"""Products of few tokens with a packed weight, which is decoded inside: it crosses memory as codes, once.

The decoded weight is the same bf16 number that `unpack` gives; sums are fp32 in another order than cuBLAS takes, in a
fixed one: parts of the long side first, then the parts. Beyond MAX_TOKENS decoding once and a dense product are faster.
"""

import torch
from torch import Tensor

from fp4lab.nvfp4 import kernels
from fp4lab.nvfp4.packed import PackedTensor

MAX_TOKENS = 64
ROWS, COLS = 32, 128  # of the tile of the weight that a program decodes at a time
PROGRAMS = 528  # four for each of an H200's multiprocessors; the long side is split until there are so many
MAX_SPLIT = 16


def takes(x: Tensor, p: PackedTensor) -> bool:
    """Whether `matmul` and `matmul_transposed` have a kernel for x [N, *] and p."""
    rows, cols = p.shape[0], p.codes.shape[1] * 2
    return (
        kernels.available(p.device)
        and x.dtype == torch.bfloat16
        and x.shape[0] <= MAX_TOKENS
        and rows % ROWS == 0
        and cols % COLS == 0
        and p.shape[1] == cols
    )


def matmul(x: Tensor, p: PackedTensor) -> Tensor:
    """x [N, in] times the transpose of p [out, in] -> [N, out] in x's dtype."""
    return _launch(x, p, transposed=False)


def matmul_transposed(x: Tensor, p: PackedTensor) -> Tensor:
    """x [N, out] times p [out, in] -> [N, in] in x's dtype: the gradient of the input."""
    return _launch(x, p, transposed=True)


def _launch(x: Tensor, p: PackedTensor, transposed: bool) -> Tensor:
    rows, cols = p.shape
    tokens, x = x.shape[0], x.contiguous()
    wide, long = (cols, rows) if transposed else (rows, cols)  # of the result, of the sum
    tile, step = (COLS, ROWS) if transposed else (ROWS, COLS)
    tiles, steps = wide // tile, long // step
    split = max(1, min(MAX_SPLIT, PROGRAMS // tiles, steps))
    parts = torch.empty(split, tokens, wide, dtype=torch.float32, device=x.device)
    g = p.global_scale
    _product[(tiles, split)](
        *(x, p.codes.view(torch.int32), p.block_scale.view(torch.uint8), parts if g is None else g, parts),
        *(tokens, wide, long, cols, -(-steps // split)),
        LEVELS=0 if g is None else 1 + g.ndim // 2,
        DIVIDE=p.divide,
        TRANSPOSED=transposed,
        T=max(16, 1 << (tokens - 1).bit_length()),
        ROWS=ROWS,
        COLS=COLS,
        num_warps=4,
    )
    return (parts[0] if split == 1 else parts.sum(0)).to(x.dtype)


if kernels.triton is not None:
    from fp4lab.nvfp4.kernels import positive_scale, tl, triton

    @triton.jit
    def _code(word, scale, LANE: tl.constexpr):
        top = word << (28 - 4 * LANE)
        return (((top >> 6) & -2118123520).to(tl.float32, bitcast=True) * scale).to(tl.bfloat16)

    @triton.jit
    def _pair(word, scale, A: tl.constexpr, B: tl.constexpr):
        """Columns A and B of every eight, next to each other: interleaving again and again keeps a word in one thread."""
        return tl.interleave(_code(word, scale, A), _code(word, scale, B))

    @triton.jit(do_not_specialize=["tokens", "steps"])
    def _product(
        x, codes, scales, second, out,
        tokens, wide, long, cols, steps,
        LEVELS: tl.constexpr, DIVIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
        T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        WIDE: tl.constexpr = COLS if TRANSPOSED else ROWS
        LONG: tl.constexpr = ROWS if TRANSPOSED else COLS
        tile, part = tl.program_id(0), tl.program_id(1)
        token = tl.arange(0, T)
        total = tl.zeros((T, WIDE), tl.float32)
        last = tl.minimum((part + 1) * steps * LONG, long)
        for start in range(part * steps * LONG, last, LONG):
            row = (start if TRANSPOSED else tile * ROWS) + tl.arange(0, ROWS)
            column = tile * COLS if TRANSPOSED else start
            block = tl.arange(0, COLS // 8)[None, :]
            word = tl.load(codes + row[:, None] * (cols // 8) + column // 8 + block)
            scale = positive_scale(tl.load(scales + row[:, None] * (cols // 16) + column // 16 + block // 2).to(tl.int32))
            if LEVELS > 0:
                g = tl.load(second + row)[:, None] if LEVELS == 2 else tl.load(second)
                scale = tl.math.div_rn(scale, g) if DIVIDE else scale * g
            # 2^-10 of the weight, exact until it is rounded: 2^126 times a scale of 448 would be infinite
            scale *= 8.307674973655724e34
            even = tl.interleave(_pair(word, scale, 0, 4), _pair(word, scale, 2, 6))
            weight = tl.interleave(even, tl.interleave(_pair(word, scale, 1, 5), _pair(word, scale, 3, 7)))
            along = start + tl.arange(0, LONG)
            value = tl.load(x + token[:, None] * long + along[None, :], mask=token[:, None] < tokens, other=0.0)
            total = tl.dot(value, weight if TRANSPOSED else tl.trans(weight), total)
        to = tl.arange(0, WIDE) + tile * WIDE
        tl.store(out + (part * tokens + token[:, None]) * wide + to[None, :], total * 1024, mask=token[:, None] < tokens)
