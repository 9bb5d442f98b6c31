"""One AdamW update of packed rows whose gradient is a product of few tokens, dy^T x: the gradient never exists in memory.

`train.adamw.update_rows` of that gradient, unrounded, is its definition; `adamw_kernel` says in what the arithmetic differs.

Two kernels: `_bounds` finds the rows' largest gradients, on which the moments' second level depends, and `_product` updates.
Both make the gradient of a tile with the matrix units. Which column a register stands for is for us to say, so a thread gets
all 16 of a block in each of two rows, and no value ever moves between threads. Codes, scales and x come through shared memory,
a tile ahead: a program has too few warps to wait for memory (doc/benchmarks.md). What happens to eight codes at a time is in
`assembly`.
"""

import torch
from torch import Tensor

from fp4lab.nvfp4 import kernels
from fp4lab.nvfp4.adamw_kernel import COUNTS, NEVER, SPREAD, Constants
from fp4lab.nvfp4.adamw_tiles import CHUNK, COLS, ROWS, layouts
from fp4lab.nvfp4.packed import BLOCK, PackedTensor
from fp4lab.nvfp4.update import MOMENT_LANES
from fp4lab.nvfp4.update import SECOND_WORD as SECOND_WORD_LANE

TOKENS = 32  # of a product that are few
WARPS = 4  # of a program
TILES = 5  # that it takes one after the other
STAGES = 2  # tiles whose loads are under way or in use


def why_not(w: PackedTensor, m: "PackedTensor | Tensor", c: Constants, dtype: torch.dtype, n: int) -> str | None:
    """Why the update of w with a gradient of n tokens is not made here, or None."""
    rows, cols = w.shape
    if n > TOKENS:
        return f"{n} tokens are many: their gradient is a product of its own"
    if kernels.gl is None:
        return "this Triton has no Gluon"
    if dtype != torch.bfloat16:
        return f"it is for bfloat16, not {dtype}"
    if not isinstance(m, PackedTensor) or not c.stochastic:
        return "it is for packed moments and stochastic weights"
    if cols % (COLS * WARPS) or rows % ROWS:
        return f"{rows} x {cols} is not whole tiles of {ROWS} x {COLS * WARPS}"
    return None


def adamw_product(
    dy: Tensor,
    x: Tensor,
    w: PackedTensor,
    m: PackedTensor,
    v: PackedTensor,
    numbers: Tensor,
    counts: Tensor,
    tensor: int,
    first: int,
    c: Constants,
    count: bool = False,
    borders: tuple[int, int] = (NEVER, NEVER),
) -> None:
    """Updates rows in place with the gradient dy^T x; dy [n, rows], x [n, cols] bf16. The rest as `adamw_kernel.adamw`."""
    n, rows = dy.shape
    cols, second = x.shape[1], w.global_scale
    assert counts.shape == (SPREAD, len(COUNTS)) and m.global_scale is not None and v.global_scale is not None
    pairs = CHUNK // 4 if n <= CHUNK // 2 else -(-n // CHUNK) * CHUNK // 2
    paired = torch.empty(pairs, cols, 2, dtype=x.dtype, device=x.device)
    kernels.pair_rows(x, paired)
    wide = 2 * WARPS if cols % (2 * WARPS * COLS) == 0 and pairs <= CHUNK // 2 else WARPS  # of the bounds: rows are few
    lie = layouts(pairs, wide)
    bounds = torch.empty(6, rows, dtype=torch.float32, device=x.device)
    decays = c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2
    _bounds[(rows // ROWS,)](
        *(dy, paired, n, rows, cols, m.global_scale, v.global_scale, bounds, *decays, pairs, wide, STAGES),
        *(lie.x, lie.dy, lie.mma, lie.copied_x, lie.shared_x),
        num_warps=wide,
    )
    tiles = cols // (COLS * WARPS)
    parts = -(-tiles // TILES)
    each = -(-tiles // parts)
    _product[(rows // ROWS, parts)](
        *(dy, paired, n, rows, cols // BLOCK, each, bounds),
        *(w.codes.view(torch.int32), _fours(w), counts if second is None else second),
        *(m.codes.view(torch.int32), _fours(m), v.codes.view(torch.int32), _fours(v)),
        *(numbers, counts, first, tensor, *borders, decays[1], decays[3], c.eps, c.weight_decay, c.max_update or 0.0),
        *(c.max_update is not None, 0 if second is None else 2 if w.divide else 1, count),
        *(pairs, WARPS, STAGES, *layouts(pairs, WARPS)),
        num_warps=WARPS,
    )


def _fours(p: PackedTensor) -> Tensor:
    """Block scales, four in 32 bits."""
    return p.block_scale.view(torch.int32)


if kernels.gl is not None:
    from fp4lab.nvfp4 import assembly
    from fp4lab.nvfp4.adamw_tiles import allocate, factor, fetch, fetch_x, gradient, halves, read_half
    from fp4lab.nvfp4.kernels import async_copy, barrier, gl, gluon
    from fp4lab.nvfp4.product_kernel import axis_index

    DECODE, SQUARE, DECODED = map(gl.constexpr, (assembly.DECODE, assembly.SQUARE, assembly.DECODED))
    ENCODE, ENCODE_UNSIGNED, ENCODE_DITHERED, ENCODED = map(
        gl.constexpr, (assembly.ENCODE, assembly.ENCODE_UNSIGNED, assembly.ENCODE_DITHERED, assembly.ENCODED)
    )
    CAP, CAPPED, RESCALE, RESCALED = map(gl.constexpr, (assembly.CAP, assembly.CAPPED, assembly.RESCALE, assembly.RESCALED))
    SCALE, SCALED, NOISE = map(gl.constexpr, (assembly.SCALE, assembly.SCALED, assembly.NOISE))
    M_LANE, M_SCALE_LANE, V_LANE, V_SCALE_LANE = map(gl.constexpr, MOMENT_LANES)
    SECOND_WORD = gl.constexpr(SECOND_WORD_LANE - (1 << 32))
    _TINY = gl.constexpr(2.0**-10)  # what everything is of itself inside
    _DOWN = gl.constexpr(2.0**-126)
    _UP = gl.constexpr(2.0**4)  # of decoded codes, which are 2^-14 of their values

    @gluon.jit
    def _sqrt(x):
        return gl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)

    @gluon.jit
    def _reciprocal(x):
        return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)

    @gluon.jit
    def _mix(x):
        """`train.noise.mix` of uint32."""
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @gluon.jit
    def _larger_or_nan(a, b):
        return gl.inline_asm_elementwise("max.NaN.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1)

    @gluon.jit
    def _larger(a, x):
        """max(a, |x|)"""
        return gl.inline_asm_elementwise(
            "{ .reg .f32 t; abs.f32 t, $2; max.f32 $0, $1, t; }", "=f,f,f", [a, x], dtype=gl.float32, is_pure=True, pack=1
        )

    @gluon.jit
    def _first(a, b):
        return a

    @gluon.jit
    def _of_block(x):
        """[.., block] -> [.., block, 1, 1]."""
        return gl.expand_dims(gl.expand_dims(x, 3), 4)

    @gluon.jit
    def _values(word, like, TEXT: gl.constexpr):
        """Words [.., 2] -> [.., 2, 8] fp32."""
        return gl.inline_asm_elementwise(TEXT, DECODED, [gl.expand_dims(word, 4), like], dtype=gl.float32, is_pure=True, pack=8)

    @gluon.jit
    def _word(x, inverse, add, TEXT: gl.constexpr):
        """Values [.., 2, 8], the inverse of their block's scale and what to add -> words [.., 2]."""
        word = gl.inline_asm_elementwise(TEXT, ENCODED, [x, inverse, add], dtype=gl.int32, is_pure=True, pack=8)
        return gl.reduce(word, 4, _first)

    @gluon.jit
    def _scale(byte):
        """E4M3 bytes 0..0x7E as int32 -> fp32."""
        return byte.to(gl.uint8).to(gl.float8e4nv, bitcast=True).to(gl.float32)

    @gluon.jit
    def _block_max(x):
        return gl.max(gl.max(x, 4), 3)

    @gluon.jit
    def _stored(x, amax, hash, bound, places, bytes, words, at, OWN: gl.constexpr, SCALES: gl.constexpr, TEXT: gl.constexpr):
        """Writes a moment's tile as `nvfp4.pack_stochastic` does, and returns the bytes of its scales; bound: the row's, of
        `_bounds`."""
        sixth, least = bound
        fraction = ((hash * SCALES) >> 12).to(gl.int32, bitcast=True)
        byte = gl.inline_asm_elementwise(SCALE, SCALED, [amax * sixth, fraction], dtype=gl.int32, is_pure=True, pack=1)
        noise = ((hash * OWN) >> 4).to(gl.int32, bitcast=True) & NOISE
        inverse = gl.minimum(_reciprocal(amax) * (6 * _DOWN), least)
        gl.store(places + words, _word(x, _of_block(inverse), _of_block(noise), TEXT))
        gl.store(bytes.to(gl.pointer_type(gl.uint8), bitcast=True) + at, byte.to(gl.uint8))
        return byte

    @gluon.jit
    def _update(
        g, at, word, counter, half, sums, held, shift, mc, ms, vc, vs, wc, ws, numbers_in,
        CAPPED_UPDATE: gl.constexpr, COUNT: gl.constexpr,
    ):  # fmt: skip
        """One tile [warp, row, block, word, element] of a half, whose w, m and v are `held`: writes them and adds to `sums`."""
        m_old, v_old, m_new, v_new, key = half
        root_in, eps_in, bound, keep = numbers_in
        squares, largest, total = sums
        words = gl.expand_dims(at, 3) * 2 + word
        wm, m_bytes, wv, v_bytes, ww, w_bytes = held
        byte = (w_bytes >> shift) & 0xFF
        m_scale = _of_block(_scale(m_bytes >> shift) * m_old)
        v_scale = _of_block(_scale(v_bytes >> shift) * v_old)
        m = _values(wm, g, DECODE) * m_scale + g
        square = g * g
        squares += gl.sum(gl.sum(square, 4), 3)
        v = _values(wv, g, SQUARE) * (v_scale * v_scale) + square
        q = _sqrt(v)
        u = m * _reciprocal(q * root_in + eps_in)
        if CAPPED_UPDATE:
            u = gl.minimum(gl.maximum(u, -bound), bound)
        largest = gl.maximum(largest, _block_max(gl.abs(u)))
        scale = _scale(byte)
        new = _values(ww, g, DECODE) * _of_block(scale * keep) - u

        hash = _mix(counter ^ key) & 0xFFFFF000
        m_byte = _stored(m, _block_max(gl.abs(m)), hash, m_new, mc, ms, words, at, M_LANE, M_SCALE_LANE, ENCODE)
        v_byte = _stored(q, _block_max(q), hash, v_new, vc, vs, words, at, V_LANE, V_SCALE_LANE, ENCODE_UNSIGNED)

        amax = gl.reduce(gl.reduce(gl.abs(new), 4, _larger_or_nan), 3, _larger_or_nan) * 1024
        hash = hash.to(gl.int32, bitcast=True)
        new_byte, new_scale, top, limit = gl.inline_asm_elementwise(
            RESCALE, RESCALED, [amax, byte, scale, hash],
            dtype=(gl.int32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        inverse = gl.where(new_byte > 0, _reciprocal(new_scale) * (1024 * _DOWN), 0.0)
        capped = gl.inline_asm_elementwise(
            CAP, CAPPED,
            [new, _of_block(top * _TINY), _of_block(limit * _TINY), _of_block(new_scale * (6 * _TINY))],
            dtype=gl.float32, is_pure=True, pack=8,
        )  # fmt: skip
        each = gl.expand_dims(gl.expand_dims(hash, 3) * gl.where(word == 0, 1, SECOND_WORD), 4)
        w_new = _word(capped, _of_block(inverse), each, ENCODE_DITHERED)
        gl.store(wc + words, w_new)
        bytes = ws.to(gl.pointer_type(gl.uint8), bitcast=True)
        gl.store(bytes + at, gl.where(amax < float("inf"), new_byte, 0x7F).to(gl.uint8))
        if COUNT:
            moved, asked, lost, made, wanted, full, zero_w, zero_m, zero_v = total
            before = _values(ww, g, DECODE) * _of_block(scale * _UP)
            change = _values(w_new, g, DECODE) * _of_block(new_scale * _UP) - before
            asking = new - before
            rescaled = _of_block(new_byte != byte)
            moved += gl.sum(gl.sum(((change != 0) | rescaled).to(gl.float32), 4), 3)
            asked += gl.sum(gl.sum((asking != 0).to(gl.float32), 4), 3)
            lost += gl.sum(gl.sum(((asking != 0) & (change == 0)).to(gl.float32), 4), 3)
            made += gl.sum(gl.sum(change * asking, 4), 3)
            wanted += gl.sum(gl.sum(asking * asking, 4), 3)
            full += (new_byte == 0x7E).to(gl.float32)
            zero_w += (new_byte == 0).to(gl.float32)
            zero_m += (m_byte == 0).to(gl.float32)
            zero_v += (v_byte == 0).to(gl.float32)
            total = (moved, asked, lost, made, wanted, full, zero_w, zero_m, zero_v)
        return squares, largest, total

    @gluon.jit
    def _tensor_of(row, first, tensor, border1, border2, seed):
        """The row within its own tensor, and the key of that one's dither; row [1, 8, 1]."""
        index = row + first - gl.where(row >= border2, border2, gl.where(row >= border1, border1, 0))
        key = tensor + (row >= border1).to(gl.int32) + (row >= border2).to(gl.int32)
        return index, _mix(seed + key.to(gl.uint32))

    @gluon.jit
    def _whole(x):
        return gl.sum(gl.sum(gl.sum(x, 2), 1), 0)

    @gluon.jit(do_not_specialize=["n"])
    def _bounds(
        dy_ptr, pairs, n, rows, cols, mg, vg, bounds, beta1, rest1, beta2, rest2,
        P: gl.constexpr, W: gl.constexpr, S: gl.constexpr, L_X: gl.constexpr, L_DY: gl.constexpr, MMA: gl.constexpr,
        LC_X: gl.constexpr, SH_X: gl.constexpr,
    ):  # fmt: skip
        """The moments' second levels of sixteen rows, which their largest gradient moves, and what `_product` makes of them."""
        origin = gl.program_id(0) * 16
        a = factor(dy_ptr, n, rows, origin, 16 if P == 4 else 2 * P, W, L_DY, MMA)
        x_buffer = gl.allocate_shared_memory(gl.bfloat16, [S, P, 128 * W], SH_X)
        for i in gl.static_range(S - 1):
            fetch_x(x_buffer.index(i), pairs, cols, gl.minimum(64 * W * i, cols - 64 * W), P, W, LC_X)
            async_copy.commit_group()
        most = gl.zeros((W, 16, 64), gl.float32, MMA)
        stage = 0
        for start in range(0, cols, 64 * W):
            async_copy.wait_group(S - 2)
            barrier()
            g = gradient(a, x_buffer.index(stage), P, MMA, W, L_X)
            free = gl.where(stage == 0, S - 1, stage - 1)
            # beyond the last the last again, for nothing
            fetch_x(x_buffer.index(free), pairs, cols, gl.minimum(start + 64 * W * (S - 1), cols - 64 * W), P, W, LC_X)
            async_copy.commit_group()
            stage = gl.where(stage == S - 1, 0, stage + 1)
            most = _larger(most, g)
        async_copy.wait_group(0)
        now = gl.max(gl.max(most, 2), 0) * (1024.0 / 2688.0)
        row = origin + gl.arange(0, 16, layout=now.type.layout)
        m, v = gl.load(mg + row), gl.load(vg + row)
        m_new, v_new = m * beta1 + now * rest1, gl.sqrt(v * v * beta2 + now * now * rest2)
        gl.store(mg + row, m_new)
        gl.store(vg + row, v_new)
        m_new, v_new = m_new * (_TINY / rest1), v_new * (_TINY / gl.sqrt(rest2))
        gl.store(bounds + row, m * (beta1 / rest1 * (_TINY * 16384.0)))
        gl.store(bounds + rows + row, v * (gl.sqrt(beta2 / rest2) * _TINY))
        # of six times them, and 2^-126 of it times the least block scale; a scale of 0 says that all is 0
        gl.store(bounds + 2 * rows + row, gl.where(m_new > 0, 1 / (6 * m_new), 0.0))
        gl.store(bounds + 3 * rows + row, gl.where(m_new > 0, 512 * _DOWN / m_new, 0.0))
        gl.store(bounds + 4 * rows + row, gl.where(v_new > 0, 1 / (6 * v_new), 0.0))
        gl.store(bounds + 5 * rows + row, gl.where(v_new > 0, 512 * _DOWN / v_new, 0.0))

    @gluon.jit
    def _half(bounds, rows, row, first, tensor, border1, border2, seed):
        """What `_update` needs of rows [1, 8, 1], and the row within its own tensor."""
        index, key = _tensor_of(row, first, tensor, border1, border2, seed)
        at = bounds + row
        m, v = gl.load(at), gl.load(at + rows)
        m_new = (gl.load(at + 2 * rows), gl.load(at + 3 * rows))
        v_new = (gl.load(at + 4 * rows), gl.load(at + 5 * rows))
        return (m, v, m_new, v_new, key), index

    @gluon.jit(do_not_specialize=["first", "tensor", "border1", "border2", "n", "each"])
    def _product(
        dy_ptr, pairs, n, rows, blocks, each, bounds, wc, ws, wg, mc, ms, vc, vs, numbers, counts, first, tensor, border1,
        border2, rest1, rest2, eps, decay, cap,
        CAPPED_UPDATE: gl.constexpr, SECOND: gl.constexpr, COUNT: gl.constexpr, P: gl.constexpr, W: gl.constexpr,
        S: gl.constexpr, L: gl.constexpr, L_X: gl.constexpr, L_DY: gl.constexpr, LW: gl.constexpr, LF: gl.constexpr,
        MMA: gl.constexpr, LC_X: gl.constexpr, LC: gl.constexpr, LS: gl.constexpr, SH_X: gl.constexpr, SH: gl.constexpr,
        SH_S: gl.constexpr,
    ):  # fmt: skip
        origin = gl.program_id(0) * 16
        counts += ((gl.program_id(0) + gl.program_id(1)) % 32) * 13
        L_WORD: gl.constexpr = gl.SliceLayout(4, L)
        L_BLOCK: gl.constexpr = gl.SliceLayout(3, L_WORD)
        cols = blocks * 16
        K: gl.constexpr = 16 if P == 4 else 2 * P
        a = factor(dy_ptr, n, rows, origin, K, W, L_DY, MMA)
        x_buffer = gl.allocate_shared_memory(gl.bfloat16, [S, P, 128 * W], SH_X)
        buffers = allocate(W, S, SH, SH_S)
        pointers = (mc, ms, vc, vs, wc, ws)

        begin = gl.program_id(1) * each * (4 * W)
        end = gl.minimum(begin + each * (4 * W), blocks)
        for i in gl.static_range(S - 1):
            block = gl.minimum(begin + 4 * W * i, end - 4 * W)
            fetch_x(x_buffer.index(i), pairs, cols, block * 16, P, W, LC_X)
            fetch(buffers, pointers, origin, blocks, block, i, W, LC, LS)
            async_copy.commit_group()

        lr, c1, c2 = gl.load(numbers), gl.load(numbers + 1), gl.load(numbers + 2)
        seed = gl.load(numbers + 3).to(gl.uint32, bitcast=True)
        unit = 1.0  # a weight in units of its second level, times this, is the weight
        if SECOND == 1:
            unit = gl.load(wg)
        if SECOND == 2:
            unit = 1.0 / gl.load(wg)
        # update = m c1 / (sqrt(v c2) + eps). Inside, m and v are of gradients 2^-10 of themselves and lack their factors rest1
        # and rest2, and the update is one of 2^-10 of the weight in units of its second level.
        step = gl.maximum(lr / unit, 1e-30)
        whole = step * rest1 * c1
        numbers_in = (gl.sqrt(rest2 * c2) * 1024.0 / whole, eps / whole, cap * step * _TINY, (1 - lr * decay) * _UP)

        row0 = origin + axis_index(8, 1, 3, L_BLOCK)
        row1 = row0 + 8
        half0, index0 = _half(bounds, rows, row0, first, tensor, border1, border2, seed)
        half1, index1 = _half(bounds, rows, row1, first, tensor, border1, border2, seed)
        none = gl.zeros((W, 8, 4), gl.float32, L_BLOCK)
        sums = (none, none, (none, none, none, none, none, none, none, none, none))
        word = axis_index(2, 3, 4, L_WORD)
        shift = axis_index(4, 2, 3, L_BLOCK) * 8
        mine = axis_index(W, 0, 3, L_BLOCK) * 4 + axis_index(4, 2, 3, L_BLOCK)
        here0, here1 = row0 * blocks + mine, row1 * blocks + mine
        stage = 0
        for start in range(begin, end, 4 * W):
            async_copy.wait_group(S - 2)
            barrier()
            g0, g1 = halves(gradient(a, x_buffer.index(stage), P, MMA, W, L_X), W, L)
            free = gl.where(stage == 0, S - 1, stage - 1)
            ahead = gl.minimum(start + 4 * W * (S - 1), end - 4 * W)  # beyond the last the last again, for nothing
            fetch_x(x_buffer.index(free), pairs, cols, ahead * 16, P, W, LC_X)
            fetch(buffers, pointers, origin, blocks, ahead, free, W, LC, LS)
            async_copy.commit_group()
            state = (shift, mc, ms, vc, vs, wc, ws, numbers_in)
            counter0, counter1 = (index0 * blocks + mine + start).to(gl.uint32), (index1 * blocks + mine + start).to(gl.uint32)
            held = read_half(buffers, stage, 0, W, L, LW, LF)
            sums = _update(g0, here0 + start, word, counter0, half0, sums, held, *state, CAPPED_UPDATE, COUNT)
            held = read_half(buffers, stage, 1, W, L, LW, LF)
            sums = _update(g1, here1 + start, word, counter1, half1, sums, held, *state, CAPPED_UPDATE, COUNT)
            stage = gl.where(stage == S - 1, 0, stage + 1)
        squares, largest, total = sums
        real = 1048576.0  # of squares of what is 2^-10 of itself
        gl.atomic_add(counts + 1, _whole(squares) * real, sem="relaxed")
        gl.atomic_max(counts, gl.max(gl.max(gl.max(largest, 2), 1), 0) * 1024.0 / step, sem="relaxed")
        if COUNT:
            moved, asked, lost, made, wanted, full, zero_w, zero_m, zero_v = total
            gl.atomic_add(counts + 2, 256.0 * (end - begin), sem="relaxed")
            gl.atomic_add(counts + 3, _whole(moved), sem="relaxed")
            gl.atomic_add(counts + 4, _whole(asked), sem="relaxed")
            gl.atomic_add(counts + 5, _whole(lost), sem="relaxed")
            gl.atomic_add(counts + 6, unit * unit * real * _whole(made), sem="relaxed")
            gl.atomic_add(counts + 7, unit * unit * real * _whole(wanted), sem="relaxed")
            gl.atomic_add(counts + 8, 16.0 * (end - begin), sem="relaxed")
            gl.atomic_add(counts + 9, _whole(full), sem="relaxed")
            gl.atomic_add(counts + 10, _whole(zero_w), sem="relaxed")
            gl.atomic_add(counts + 11, _whole(zero_m), sem="relaxed")
            gl.atomic_add(counts + 12, _whole(zero_v), sem="relaxed")
