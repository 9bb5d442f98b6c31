"""Tiles of a matrix for `adamw_product`: how they lie in threads and in shared memory, how they come there, their gradient.

A tile is 16 rows and 64 columns of each warp. Lane 4 r + q has of the rows r and r + 8 the q-th block of 16 of its
warp's columns, which is where the matrix units leave the sums if the columns of x are handed to them in the right order.
"""

import functools
from typing import Any, NamedTuple

from fp4lab.nvfp4 import kernels

ROWS, COLS = 16, 64  # of a tile; of it, of a warp
CHUNK = 16  # tokens that the matrix units contract at once


class Layouts(NamedTuple):
    """How tensors lie in a program's threads, are copied, and lie in its shared memory."""

    elements: Any
    x: Any
    dy: Any
    words: Any
    fours: Any
    mma: Any
    copied_x: Any
    copied_words: Any
    copied_fours: Any
    shared_x: Any
    shared_words: Any
    shared_fours: Any


@functools.cache
def layouts(pairs: int, warps: int) -> Layouts:
    """For so many pairs of tokens, and warps of a program.

    elements [warp, row, block, word, element], x [pair, column and token of the pair], dy [warp, row, token], words [row,
    word], fours [row, word of four scales], mma of the sums [warp, row, column]. Of x a lane has the pair q.
    """
    gl = kernels.gl
    warp = [[1 << i] for i in range(warps.bit_length() - 1)]

    def bases(rank: int, *places: tuple[int, int]) -> list[list[int]]:
        """Unit steps: (dimension, size)."""
        return [[size if d == dim else 0 for d in range(rank)] for dim, size in places]

    linear = gl.DistributedLinearLayout
    elements = linear(
        bases(5, (4, 1), (4, 2), (4, 4), (3, 1)),
        bases(5, (2, 1), (2, 2), (1, 1), (1, 2), (1, 4)),
        [[*b, 0, 0, 0, 0] for b in warp],
        [],
        [warps, 8, 4, 2, 8],
    )
    tokens = max(CHUNK, 2 * pairs)
    dy = linear(
        bases(3, (2, 1), (1, 8), (2, 8), *([(2, 16)] if tokens > CHUNK else [])),
        bases(3, (2, 2), (2, 4), (1, 1), (1, 2), (1, 4)),
        [[*b, 0, 0] for b in warp],
        [],
        [warps, 16, tokens],
    )
    along = [[0, b[0]] for b in warp]  # the warps share out the columns
    words = linear([[0, 1]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[0, 8 * b] for _, b in along], [], [8, 8 * warps])
    fours = linear([], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], along, [], [8, warps])
    x = linear(
        [*([0, 1 << i] for i in range(4)), *([4 << i, 0] for i in range((pairs // 4).bit_length() - 1))],
        [[1, 0], [2, 0], [0, 16], [0, 32], [0, 64]],
        [[0, 128 * b] for _, b in along],
        [],
        [pairs, 128 * warps],
    )
    # how tiles come from memory, 16 bytes a thread where rows are long enough, and lie: a row's 16 bytes by the row
    copied = (
        gl.BlockedLayout([1, 8], [1, 32], [warps, 1], [1, 0]),
        gl.BlockedLayout([1, 4], [16 // warps, 2 * warps], [warps, 1], [1, 0]),
        gl.BlockedLayout([1, 1], [32 // warps, warps], [warps, 1], [1, 0]),
    )
    shared = (
        gl.SwizzledSharedLayout(8, 1, 8, [1, 0]),
        gl.SwizzledSharedLayout(4, 1, 8, [1, 0]),
        gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
    )
    mma = gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])
    return Layouts(elements, x, dy, words, fours, mma, *copied, *shared)


if kernels.gl is not None:
    from fp4lab.nvfp4.kernels import async_load, gl, gluon, mma_v2
    from fp4lab.nvfp4.product_kernel import axis_index

    @gluon.jit
    def allocate(W: gl.constexpr, S: gl.constexpr, SH: gl.constexpr, SH_S: gl.constexpr):
        """Shared memory for S tiles of the codes and scales of m, v and w."""
        buffers = ()  # type: Any
        for _ in gl.static_range(3):
            buffers += (gl.allocate_shared_memory(gl.int32, [S, 16, 8 * W], SH),)
            buffers += (gl.allocate_shared_memory(gl.int32, [S, 16, W], SH_S),)
        return buffers

    @gluon.jit
    def fetch_x(buffer, x_ptr, cols, column, P: gl.constexpr, W: gl.constexpr, LC: gl.constexpr):
        """Begins to copy x of the columns from `column` on."""
        pair = gl.arange(0, P, layout=gl.SliceLayout(1, LC))
        at = gl.arange(0, 128 * W, layout=gl.SliceLayout(0, LC))
        place = gl.expand_dims(pair, 1) * (2 * cols) + 2 * column + gl.expand_dims(at, 0)
        async_load(buffer, x_ptr + place)

    @gluon.jit
    def fetch(buffers, pointers, origin, blocks, block, stage, W: gl.constexpr, LC: gl.constexpr, LS: gl.constexpr):
        """The same of the codes and scales of m, v and w, from the row `origin` and the block `block` on."""
        row = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(1, LC)), 1) + origin
        at = row * (2 * blocks) + 2 * block + gl.expand_dims(gl.arange(0, 8 * W, layout=gl.SliceLayout(0, LC)), 0)
        row = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(1, LS)), 1) + origin
        four = row * (blocks // 4) + block // 4 + gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(0, LS)), 0)
        for i in gl.static_range(3):
            async_load(buffers[2 * i].index(stage), pointers[2 * i] + at)
            async_load(buffers[2 * i + 1].index(stage), pointers[2 * i + 1] + four)

    @gluon.jit
    def gradient(a, buffer, P: gl.constexpr, MMA: gl.constexpr, W: gl.constexpr, L_X: gl.constexpr):
        """Sums [warp, 16, 64] of a tile."""
        acc = gl.zeros((W, 16, 64), gl.float32, MMA)
        x = gl.reshape(buffer.load(L_X), (P, W, 4, 2, 8, 2))
        if P == 4:  # noqa: SIM108 - of eight; the other side would not compile
            x = gl.permute(gl.join(x, gl.zeros_like(x)), (1, 6, 0, 5, 4, 2, 3))
        else:
            x = gl.permute(x, (1, 0, 5, 4, 2, 3))
        x = gl.reshape(x, (W, P // 8 * 16 if P > 4 else 16, 64))
        return mma_v2(a, gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True), acc)

    @gluon.jit
    def halves(x, W: gl.constexpr, L: gl.constexpr):
        """Sums [warp, 16, 64] -> [warp, 8, block, word, element] of rows 0..7 and of rows 8..15."""
        x = gl.reshape(x, (W, 2, 8, 8, 4, 2))
        a, b = gl.split(gl.permute(x, (0, 2, 4, 5, 3, 1)))
        return gl.convert_layout(a, L, assert_trivial=True), gl.convert_layout(b, L, assert_trivial=True)

    @gluon.jit
    def read_half(buffers, stage, h: gl.constexpr, W: gl.constexpr, L: gl.constexpr, LW: gl.constexpr, LF: gl.constexpr):
        """Of m, v and w: words of codes [warp, row, block, word], and scales [warp, row, 1], four in 32 bits."""
        L_WORD: gl.constexpr = gl.SliceLayout(4, L)
        L_BLOCK: gl.constexpr = gl.SliceLayout(3, L_WORD)
        held = ()  # type: Any
        for i in gl.static_range(3):
            words = gl.reshape(buffers[2 * i].index(stage).slice(8 * h, 8).load(LW), (8, W, 4, 2))
            words = gl.convert_layout(gl.permute(words, (1, 0, 2, 3)), L_WORD, assert_trivial=True)
            fours = gl.permute(buffers[2 * i + 1].index(stage).slice(8 * h, 8).load(LF), (1, 0))
            fours = gl.expand_dims(gl.convert_layout(fours, gl.SliceLayout(2, L_BLOCK), assert_trivial=True), 2)
            held += (words, fours)
        return held

    @gluon.jit
    def factor(dy_ptr, n, rows, origin, K: gl.constexpr, W: gl.constexpr, L_DY: gl.constexpr, MMA: gl.constexpr):
        """2^-10, which is exact, of dy of sixteen rows [warp, row, token]."""
        token = axis_index(K, 2, 3, L_DY)
        at = token * rows + origin + axis_index(16, 1, 3, L_DY) + axis_index(W, 0, 3, L_DY) * 0
        dy = (gl.load(dy_ptr + at, mask=at * 0 + token < n, other=0.0) * 0.0009765625).to(gl.bfloat16)
        return gl.convert_layout(dy, gl.DotOperandLayout(0, MMA, 2))
