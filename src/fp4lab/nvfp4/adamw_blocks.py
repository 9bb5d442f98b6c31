"""What the update's kernel does to the blocks of a tile: `adamw_kernel._adamw` is made of these.

A tile is C blocks of a row, one a thread. Of its numbers the first eight of each block are one tensor [C, 8], the others a
second; codes come and go as a block's int64, of which each half is the word of eight.
"""

from fp4lab.nvfp4 import kernels
from fp4lab.nvfp4.update import MOMENT_LANES, SECOND_WORD

SMALL = 2.0**-10  # what everything is of itself inside

if kernels.triton is not None:
    from fp4lab.nvfp4 import assembly
    from fp4lab.nvfp4.kernels import tl, triton

    DECODE, SQUARE, DECODED = map(tl.constexpr, (assembly.DECODE, assembly.SQUARE, assembly.DECODED))
    WIDEN, WIDENED = tl.constexpr(assembly.WIDEN), tl.constexpr(assembly.WIDENED)
    ENCODE, ENCODE_UNSIGNED = tl.constexpr(assembly.ENCODE), tl.constexpr(assembly.ENCODE_UNSIGNED)
    ENCODE_DITHERED, ENCODED = tl.constexpr(assembly.ENCODE_DITHERED), tl.constexpr(assembly.ENCODED)
    CAP, CAPPED, RESCALE, RESCALED = map(tl.constexpr, (assembly.CAP, assembly.CAPPED, assembly.RESCALE, assembly.RESCALED))
    SCALE, SCALED, NOISE = map(tl.constexpr, (assembly.SCALE, assembly.SCALED, assembly.NOISE))
    M_LANE, M_SCALE_LANE, V_LANE, V_SCALE_LANE = map(tl.constexpr, MOMENT_LANES)
    HALF, OTHER_WORD = tl.constexpr(assembly.HALF), tl.constexpr(SECOND_WORD)
    TINY = tl.constexpr(SMALL)
    CODE = tl.constexpr(2.0**14)  # decoded codes are so much smaller than their values
    UP = tl.constexpr(2.0**4)  # what makes them 2^-10 of it
    DOWN = tl.constexpr(2.0**-126)
    NOTHING = tl.constexpr(2.0**-110)  # a moment's second level that small is 0: its reciprocal would be too large

    @triton.jit
    def approx_sqrt(x):
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def approx_reciprocal(x):
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def max_or_nan(a, b):
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def block_max(a, b):
        return tl.max(tl.maximum(a, b), axis=1)

    @triton.jit
    def first_of(a, b):
        return a

    @triton.jit
    def e4m3(byte):
        """E4M3 bytes 0..0x7E -> fp32."""
        return byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)

    @triton.jit
    def decode(word, lane, TEXT: tl.constexpr):
        """Words [N] of eight codes -> [N, 8] fp32; lane = 0..7 is not read, but gives the shape."""
        return tl.inline_asm_elementwise(TEXT, DECODED, [word[:, None], lane[None, :]], dtype=tl.float32, is_pure=True, pack=8)

    @triton.jit
    def small_gradient(g):
        """2^-10 of it, fp32."""
        if g.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(WIDEN, WIDENED, [g], dtype=tl.float32, is_pure=True, pack=8)
        return g.to(tl.float32) * TINY

    @triton.jit
    def split_words(pair):
        """Blocks of sixteen codes [N] -> their two words [N]."""
        return pair.to(tl.int32), (pair >> 32).to(tl.int32)

    @triton.jit
    def join_words(w0, w1):
        return (w1.to(tl.int64) << 32) | w0.to(tl.uint32, bitcast=True).to(tl.int64)

    @triton.jit
    def encode(x, inverse, add, TEXT: tl.constexpr):
        """Values [N, 8], the inverse of their block's scale and what to add [N] -> words [N]."""
        word = tl.inline_asm_elementwise(
            TEXT, ENCODED, [x, inverse[:, None], add[:, None]], dtype=tl.int32, is_pure=True, pack=8
        )
        return tl.reduce(word, 1, first_of)

    @triton.jit
    def cap_block(x, most, limit, top):
        return tl.inline_asm_elementwise(
            CAP, CAPPED, [x, most[:, None], limit[:, None], top[:, None]], dtype=tl.float32, is_pure=True, pack=8
        )

    @triton.jit
    def store_moment(x0, x1, hash, bound, places, bytes, at, ok, OWN: tl.constexpr, SCALES: tl.constexpr, TEXT: tl.constexpr):
        """Writes a moment's blocks as `nvfp4.pack_stochastic` does, and returns the bytes of their scales."""
        amax = block_max(tl.abs(x0), tl.abs(x1))
        one = tl.where(bound > NOTHING, approx_reciprocal(bound), 0.0)  # a scale of 0 says that all is 0
        sixth, least = one * (1 / 6), one * (512 * DOWN)
        fraction = ((hash * SCALES) >> 12).to(tl.int32, bitcast=True)
        byte = tl.inline_asm_elementwise(SCALE, SCALED, [amax * sixth, fraction], dtype=tl.int32, is_pure=True, pack=1)
        noise = ((hash * OWN) >> 4).to(tl.int32, bitcast=True) & NOISE
        inverse = tl.minimum(approx_reciprocal(amax) * (6 * DOWN), least)
        tl.store(bytes + at, byte.to(tl.uint8), mask=ok)
        tl.store(places + at, join_words(encode(x0, inverse, noise, TEXT), encode(x1, inverse, noise, TEXT)), mask=ok)
        return byte

    @triton.jit
    def add_counts(total, before, wanted, after, rescaled, ok):
        """What became of one tile of eight columns a block, added to five sums a block: see `train.health.Health.weights`."""
        moved, asked, lost, made, square = total
        step = tl.where(ok[:, None], wanted - before, 0.0)
        change = tl.where(ok[:, None], after - before, 0.0)
        moved += tl.sum(((change != 0) | (rescaled & ok)[:, None]).to(tl.float32), axis=1)
        asked += tl.sum((step != 0).to(tl.float32), axis=1)
        lost += tl.sum(((step != 0) & (change == 0)).to(tl.float32), axis=1)
        return moved, asked, lost, made + tl.sum(change * step, axis=1), square + tl.sum(step * step, axis=1)

    @triton.jit
    def larger_pair(a, b):
        """The larger magnitudes of two bf16 in 32 bits each; their signs mean nothing."""
        text: tl.constexpr = "max.xorsign.abs.bf16x2 $0, $1, $2;"
        return tl.inline_asm_elementwise(text, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)

    @triton.jit
    def tile_mask(start, blocks, WHOLE: tl.constexpr, C: tl.constexpr):
        """Which of C blocks a row has; known to be all where it is of whole tiles."""
        return tl.full((C,), True, tl.int1) if WHOLE else start + tl.arange(0, C) < blocks

    @triton.jit
    def lines_of_tile(wc, ws, mc, ms, vc, vs, C: tl.constexpr):
        """Cache lines of a tile's codes and scales, one a thread: address, how far on the next tile's is, and the first block
        that lies there; for threads that get no line a block that no row has."""
        LINES: tl.constexpr = C * 8 // 128
        thread = tl.arange(0, C)
        which, line = thread // LINES, thread % LINES
        codes = tl.where(which == 0, wc.to(tl.int64), tl.where(which == 1, mc.to(tl.int64), vc.to(tl.int64)))
        scales = tl.where(which == 3, ws.to(tl.int64), tl.where(which == 4, ms.to(tl.int64), vs.to(tl.int64)))
        place, far = tl.where(which < 3, codes + line * 128, scales), tl.where(which < 3, 8 * C, C)
        return place, far, tl.where(which < 3, line * 16, tl.where((which < 6) & (line == 0), 0, 0x3FFFFFFF))

    @triton.jit
    def prefetch(place, ok):
        """Asks for the cache lines at addresses, which will be wanted soon."""
        text: tl.constexpr = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }"
        tl.inline_asm_elementwise(text, "=r,l,r", [place, ok.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def row_max(g_ptr, blocks, WHOLE: tl.constexpr, C: tl.constexpr):
        """The largest magnitude of a row of 16 `blocks` numbers."""
        block, lane = tl.arange(0, C), tl.arange(0, 8)[None, :]
        if g_ptr.dtype.element_ty == tl.bfloat16:
            pairs = tl.zeros((C, 8), tl.int32)
            for start in range(0, blocks, C):
                places = g_ptr.to(tl.pointer_type(tl.int32)) + (start + block)[:, None] * 8 + lane
                pairs = larger_pair(pairs, tl.load(places, mask=tile_mask(start, blocks, WHOLE, C)[:, None], other=0))
            pair = tl.reduce(tl.reduce(pairs, 1, larger_pair), 0, larger_pair)
            low, high = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
            return tl.maximum(tl.abs(low), tl.abs(high))
        else:
            top = tl.zeros((C, 8), tl.float32)
            for start in range(0, blocks, C):
                places, inside = g_ptr + (start + block)[:, None] * 16 + lane, tile_mask(start, blocks, WHOLE, C)[:, None]
                g0 = tl.load(places, mask=inside, other=0.0).to(tl.float32)
                g1 = tl.load(places + 8, mask=inside, other=0.0).to(tl.float32)
                top = tl.maximum(top, tl.maximum(tl.abs(g0), tl.abs(g1)))
            return tl.max(tl.max(top, axis=1), axis=0)
