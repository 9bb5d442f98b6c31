"""PTX for the codes of eight columns at once, as inline assembly of the update's kernels (sm_89 and later).

Triton's own operations take half as many instructions again. Each text is for `inline_asm_elementwise` with pack=8: operands
$0..$7 are the eight results, $8..$15 the first argument, and of an argument that is the same for all eight $16, $24, $32, of
which the first is read. A result that is a word is $0, and the other seven are 0.
"""

from fp4lab.nvfp4.update import LANES

HALF = 1 << 27  # of a step between two codes, as ENCODE's argument
NOISE = (1 << 28) - (1 << 10)  # bits of noise there, so far below a step that what is rounded does not add up to the next


def _constraints(result: str, *arguments: str) -> str:
    return ",".join([f"=&{result}"] * 8 + [a for argument in arguments for a in [argument] * 8])


def _block(registers: str, *lines: str) -> str:
    return "{ " + registers + "\n" + "\n".join(lines) + " }"


_FLOATS = [f"cvt.f32.f16 ${i}, x{i};" for i in range(8)]
_X = ".reg .b16 x0, x1, x2, x3, x4, x5, x6, x7;"

# A word of eight codes -> 2^-14 of their values: the bits of a code are those of a half-precision number as small.
DECODE = _block(
    ".reg .b32 a, b, e, o; " + _X,
    "shl.b32 a, $8, 1; and.b32 a, a, 0x0E0E0E0E; shl.b32 b, $8, 4; lop3.b32 e, b, 0x80808080, a, 0xEA;",  # (b & c) | a
    "shr.u32 a, $8, 3; and.b32 a, a, 0x0E0E0E0E; lop3.b32 o, $8, 0x80808080, a, 0xEA;",
    "prmt.b32 a, e, 0, 0x1404; mov.b32 {x0, x2}, a; prmt.b32 a, e, 0, 0x3424; mov.b32 {x4, x6}, a;",
    "prmt.b32 a, o, 0, 0x1404; mov.b32 {x1, x3}, a; prmt.b32 a, o, 0, 0x3424; mov.b32 {x5, x7}, a;",
    *_FLOATS,
)
# A word of codes without a sign -> the squares of their values, of a code 0 that of a quarter (`train.state`): a byte
# permutation looks up four at once, as E4M3.
SQUARE = _block(
    ".reg .b32 a, b, lo, hi; .reg .b16 p, q; " + _X,
    "and.b32 a, $8, 0x77777777; shr.u32 b, a, 16; mov.b32 lo, 0x41382818; mov.b32 hi, 0x61585148;",
    "prmt.b32 a, lo, hi, a; prmt.b32 b, lo, hi, b; mov.b32 {p, q}, a;",
    "cvt.rn.f16x2.e4m3x2 a, p; mov.b32 {x0, x1}, a; cvt.rn.f16x2.e4m3x2 a, q; mov.b32 {x2, x3}, a; mov.b32 {p, q}, b;",
    "cvt.rn.f16x2.e4m3x2 a, p; mov.b32 {x4, x5}, a; cvt.rn.f16x2.e4m3x2 a, q; mov.b32 {x6, x7}, a;",
    *_FLOATS,
)
DECODED = _constraints("f", "r", "r")  # of a word and something [.., 8], which is not read


# Eight bf16 -> 2^-10 of them. A product with a power of two is exact, and one for two numbers.
WIDEN = _block(
    ".reg .b32 t, tiny, zero; mov.b32 tiny, 0x3A803A80; mov.b32 zero, 0x80008000;",
    *(
        f"fma.rn.bf16x2 t, ${8 + i}, tiny, zero; shl.b32 ${2 * i}, t, 16; and.b32 ${2 * i + 1}, t, 0xFFFF0000;"
        for i in range(4)
    ),
)
WIDENED = ",".join(["=&f"] * 8 + ["r"] * 4)


def _encode(signed: bool, dithered: bool) -> str:
    """Values (first argument) times the inverse of their block's scale, 2^-126 of it (second) -> a word of their codes.

    An E2M1 code is bits 22 to 24 of a float 2^-126 as large. What is added below them, moved up to bit 28, carries over: half
    a step or noise (third argument), or noise made of a hash (third) for each. The sum with 0 keeps ptxas 12.8 from making an
    integer product of the factors' bits. A funnel shift puts each nibble under those before it.
    """
    lines = []
    for i in reversed(range(8)):
        add = "$24"
        if dithered:
            lines.append(f"mul.lo.u32 n, $24, {LANES[i]:#x}; shr.u32 n, n, 4;")
            add = "n"
        lines.append(f"fma.rn.f32 y, ${8 + i}, $16, 0f00000000; mov.b32 t, y; mad.lo.s32 t, t, 64, {add};")
        if signed:
            lines.append(f"mov.b32 s, ${8 + i}; lop3.b32 t, s, 0x80000000, t, 0xEA;")
        lines.append("shf.l.wrap.b32 a, t, a, 4;")
    zeros = "".join(f"mov.b32 ${i}, 0;" for i in range(1, 8))
    return _block(".reg .b32 a, n, s, t; .reg .f32 y; mov.b32 a, 0;", *lines, "mov.b32 $0, a; " + zeros)


ENCODE, ENCODE_UNSIGNED, ENCODE_DITHERED = _encode(True, False), _encode(False, False), _encode(True, True)
ENCODED = _constraints("r", "f", "f", "r")


def _cap(i: int) -> str:
    x = f"${8 + i}"
    return f"abs.f32 a, {x}; setp.gt.f32 p, a, $24; min.f32 a, a, $16; selp.f32 a, $32, a, p; copysign.f32 ${i}, {x}, a;"


# Values of a block. Where the third argument is finite, the block outgrew its scale: those beyond it become the fourth, the
# others at most the second.
CAP = _block(
    ".reg .pred p; .reg .f32 a;",
    *(f"mov.f32 ${i}, ${8 + i};" for i in range(8)),
    "setp.eq.f32 p, $24, 0f7F800000; @p bra NONE;",
    *map(_cap, range(8)),
    "NONE:",
)
CAPPED = _constraints("f", "f", "f", "f", "f")

# x >= 0 and so many 2^20ths of an E4M3 step, which are added before the rest is cut off -> the byte, at least that of 2^-9.
SCALE = _block(
    ".reg .pred p; .reg .f32 c, y; .reg .b32 b, d;",
    "setp.lt.f32 p, $1, 0f3C800000; selp.f32 c, 0f3C800000, 0f00000000, p; selp.b32 d, 968, 960, p;",  # steps below 2^-6
    "add.f32 y, $1, c; min.f32 y, y, 0f43E00000; mov.b32 b, y; add.s32 b, b, $2; shr.u32 b, b, 20; sub.s32 b, b, d;",
    "max.s32 b, b, 1; min.s32 $0, b, 126;",
)
SCALED = "=r,f,r"

# A block's largest value (4), its scale byte (5), that as a float (6), its own hash (7) -> the new byte, the new scale, what
# values are capped at, and beyond what they go to the top. `nvfp4.update` says why. Most blocks keep what they have.
RESCALE = _block(
    ".reg .pred p, q; .reg .b32 low, high, x; .reg .b16 a, b; .reg .f32 wanted, f, lo, up;",
    "mov.b32 $0, $5; mov.f32 $1, $6; mov.f32 $2, 0f7F800000; mov.f32 $3, 0f7F800000;",
    "mul.f32 wanted, $4, 0f3E2AAAAB; mul.f32 f, $6, 0f3F000000;",  # of 6, and half the scale
    "setp.gt.f32 q, wanted, $6; setp.le.f32 p, wanted, f; setp.ge.and.s32 p, $5, 16, p; or.pred p, p, q; @!p bra DONE;",
    "@q bra GROWS; sub.s32 $0, $5, 8; mov.f32 $1, f; bra DONE;",
    "GROWS:",  # between which E4M3 numbers `wanted` lies
    "mov.b32 x, wanted; shr.u32 low, x, 20; sub.s32 low, low, 960;",
    "mul.f32 f, wanted, 0f44000000; cvt.rzi.s32.f32 x, f; setp.lt.f32 p, wanted, 0f3C800000; selp.b32 low, x, low, p;",
    "min.s32 low, low, 126; add.s32 high, low, 1; min.s32 high, high, 126;",
    "shl.b32 x, high, 8; or.b32 x, x, low; cvt.u16.u32 a, x; cvt.rn.f16x2.e4m3x2 x, a; mov.b32 {a, b}, x;",
    "cvt.f32.f16 lo, a; cvt.f32.f16 up, b; mul.f32 $2, lo, 0f40C00000;",
    f"mul.lo.u32 x, $7, {LANES[8]:#x}; shr.u32 x, x, 13; cvt.rn.f32.u32 f, x;",
    "fma.rn.f32 f, f, 0f36000000, 0f35800000;",  # 2^-19 and half of it: `train.noise`
    "sub.f32 wanted, up, lo; fma.rn.f32 f, f, wanted, lo; mul.f32 $3, f, 0f40C00000;",
    "setp.gt.f32 p, $4, $3; selp.b32 $0, high, low, p; selp.f32 $1, up, lo, p;",
    "DONE:",
)
RESCALED = "=&r,=&f,=&f,=&f,f,r,f,r"
