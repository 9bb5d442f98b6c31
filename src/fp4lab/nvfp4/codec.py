"""The reference codec in plain torch: one definition of every rule, on any device.

rule        block scale, before E4M3 (round to nearest even)   smallest scale   values                        zero block
ct          amax / 6 in the input's dtype, * global             2^-9             nearest, ties to even          0.125
torchao     amax / 6 in fp32 (made the reference file)          2^-6             nearest, ties to even          2^-6
native      amax / 6 in the input's dtype                       0                nearest, ties away from zero   0
nearest     amax / 6 in fp32                                    2^-9             nearest, ties to even          2^-9
stochastic  amax / 6, rounded UP so that nothing clips          2^-9             stochastic, unbiased           2^-9
four_over_six  amax / 6 or amax / 4, whichever errs less        2^-9             nearest, ties to even          2^-9

Second level (`levels`): "single" has none; "tensor" and "row" divide by amax / (6 * 448) first, so that block scales use
E4M3's whole range. ct keeps the reciprocal and divides when decoding. four_over_six divides by amax / (6 * 256): a scale of
amax / 4 is half as large again and must fit too (arXiv 2512.02010; with 4 the code's step below the largest value is a
quarter of it, with 6 a third).

Promise pack(unpack(p)) == p in codes and scales, for p = pack(x): nearest rules with single level where no block scale
is below 2^-6 (then the largest code is 6, so amax gives the same scale back); with a given second-level scale likewise.
Stochastic promises nothing: its largest code may be 4. Sources: reference section 2.4; compressed-tensors 0.20; torchao 0.18.

Scratch: rows are encoded and decoded in pieces of at most `PIECE` elements, a few fp32 copies of which live at a time.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fp4lab.nvfp4.packed import BLOCK, PackedTensor, matrix_shape

RULES = ("ct", "torchao", "native", "nearest", "stochastic", "four_over_six")
LEVELS = ("single", "tensor", "row")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # value of code 0..7; bit 3 is the sign
E2M1_MAX, E4M3_MAX, E4M3_TINY, E4M3_NORMAL = 6.0, 448.0, 2.0**-9, 2.0**-6
TOP = {"four_over_six": 256.0}  # of the block scales that a second level aims at, where it is not all of E4M3
PIECE = 1 << 22  # elements encoded or decoded at a time
CACHED = 1 << 17  # the same on a CPU, whose caches hold the copies then: three times as fast


def decode_e4m3(data: Tensor) -> Tensor:
    """uint8 bytes (or float8_e4m3fn) -> fp32. 256..448 are numbers; only 0x7F and 0xFF are NaN."""
    return data.view(torch.float8_e4m3fn).float()


def encode_e4m3(x: Tensor) -> Tensor:
    """fp32 -> float8_e4m3fn, to nearest even, saturating at +-448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_e2m1(y: Tensor, rounding: str = "even", noise: Tensor | None = None) -> Tensor:
    """fp32 values in scale units -> uint8 codes 0..15, saturating at +-6.

    rounding  "even": nearest, ties to the even code; "away": nearest, ties away from zero;
              "stochastic": up with the probability of the distance, decided by `noise`, uniform in [0, 1), like y.

    Arithmetic, no table: in 0..2 the code is y * 2, in 2..4 y + 2, in 4..6 y / 2 + 4, and the line of the right piece is
    the lowest, because the code is a concave function of y.
    """
    a = y.abs().clamp(max=E2M1_MAX)
    if rounding == "even":  # each line is rounded before its offset is added, which keeps the last bit
        code = torch.minimum(torch.minimum((a * 2).round(), a.round() + 2), (a * 0.5).round() + 4)
    elif rounding == "away":  # floor(t + 1/2) as (floor(2 t) + 1) // 2, for the same reason
        halves = torch.minimum(torch.minimum((a * 4).floor(), (a * 2).floor() + 4), a.floor() + 8)
        code = ((halves + 1) * 0.5).floor()
    elif rounding == "stochastic":
        if noise is None:
            raise ValueError("stochastic rounding needs noise")
        position = torch.minimum(torch.minimum(a * 2, a + 2), a * 0.5 + 4)
        code = (position + (1 + noise)).floor() - 1  # the sum of the two as the kernel makes it
    else:
        raise ValueError(f"rounding {rounding!r}: expected even, away or stochastic")
    sign = torch.signbit(y) if rounding != "away" else y < 0
    return code.clamp(max=7).to(torch.uint8) | (sign.to(torch.uint8) << 3)


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """[256, 2] fp32: the two values of every byte."""
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=-1)


def unpack(p: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [*p.shape] in `dtype`, computed in fp32 and rounded once."""
    rows, cols = matrix_shape(p.shape)
    padded = p.codes.shape[1] * 2
    out = torch.empty(rows, padded, dtype=dtype, device=p.device)
    table = _pairs(p.device)
    for start, stop in _pieces(rows, padded, p.device):
        scale = p.block_scale[start:stop].float()
        if p.global_scale is not None:
            g = p.global_scale[start:stop] if p.global_scale.ndim else p.global_scale
            scale = scale / g if p.divide else scale * g
        values = table[p.codes[start:stop].int()].view(stop - start, -1, BLOCK)
        out[start:stop] = (values * scale.unsqueeze(-1)).view(stop - start, padded)
    return out[:, :cols].reshape(p.shape)


def pack(
    x: Tensor,
    rule: str = "torchao",
    levels: str = "single",
    generator: torch.Generator | None = None,
    global_scale: Tensor | None = None,
    noise: Tensor | None = None,
    divide: bool | None = None,
) -> PackedTensor:
    """Quantises a float tensor of any rank >= 1 along its last dimensions (see PackedTensor for how rank is folded).

    `global_scale` (fp32 [] or [rows, 1], in the rule's own convention) is used instead of one computed from x, so that a
    fused group can share it. `noise` (uniform in [0, 1), [rows, padded cols]) replaces the generator's numbers for rule
    "stochastic". `divide` keeps that rule's second level in compressed-tensors' convention, for a tensor that came in it.
    Raises ValueError for unknown or contradictory choices.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r}: expected one of {', '.join(RULES)}")
    if levels not in LEVELS:
        raise ValueError(f"levels {levels!r}: expected one of {', '.join(LEVELS)}")
    if rule == "ct" and levels == "single":
        raise ValueError("rule 'ct' always has a second-level scale: use levels 'tensor' or 'row'")
    if rule == "native" and levels != "single":
        raise ValueError("rule 'native' has no second-level scale: use levels 'single'")
    if global_scale is not None and levels == "single":
        raise ValueError("a given global_scale needs levels 'tensor' or 'row'")
    rows, cols = matrix_shape(tuple(x.shape))
    flat = x.detach().reshape(rows, cols)
    if cols % BLOCK:
        flat = torch.nn.functional.pad(flat, (0, BLOCK - cols % BLOCK))
    divided = rule == "ct" if divide is None else divide
    if divided and levels == "single":
        divided = False
    if levels != "single" and global_scale is None:
        global_scale = second_level(flat, rule, levels, divided)
    codes = torch.empty(rows, flat.shape[1] // 2, dtype=torch.uint8, device=x.device)
    block_scale = torch.empty(rows, flat.shape[1] // BLOCK, dtype=torch.float8_e4m3fn, device=x.device)
    for start, stop in _pieces(rows, flat.shape[1], x.device):
        g = global_scale
        if g is not None and g.ndim:
            g = g[start:stop]
        dither = None
        if rule == "stochastic":
            size = (stop - start, flat.shape[1])
            dither = torch.rand(size, device=x.device, generator=generator) if noise is None else noise[start:stop]
        # every rule but ct multiplies; a second level that came as a divisor is turned for the encoding alone
        multiplier = 1 / g if g is not None and divided and rule != "ct" else g
        codes[start:stop], block_scale[start:stop] = _encode(flat[start:stop], rule, multiplier, dither)
    return PackedTensor(codes, block_scale, global_scale, tuple(x.shape), divided)


def repack_like(x: Tensor, p: PackedTensor, rule: str = "torchao", generator: torch.Generator | None = None) -> PackedTensor:
    """x packed with p's kind of scales. A per-tensor second-level scale is kept (others may share it), rows get new ones."""
    if p.divide != (rule == "ct"):
        rule = "ct" if p.divide else "nearest"
    kept = p.global_scale if p.levels == "tensor" else None
    return pack(x, rule, p.levels, generator, kept)


def second_level(x: Tensor, rule: str, levels: str, divide: bool = False) -> Tensor:
    """fp32 second-level scale of [rows, cols]: amax / 2688, or with `divide` its reciprocal. All zeros give 1."""
    return scale_of_amax(largest(x) if levels == "tensor" else largest(x, 1), rule, divide)


def largest(x: Tensor, dim: int | None = None) -> Tensor:
    """max |x| in fp32, [] or [rows, 1], without a copy of x."""
    low, high = torch.aminmax(x) if dim is None else torch.aminmax(x, dim=dim, keepdim=True)
    return torch.maximum(-low, high).float()


def scale_of_amax(amax: Tensor, rule: str, divide: bool) -> Tensor:
    """The second-level scale that `rule` gives a tensor, row or fused group whose largest magnitude is amax (fp32)."""
    top = TOP.get(rule, E4M3_MAX) * E2M1_MAX
    return torch.where(amax > 0, top / amax if divide else amax / top, 1.0)


def _encode(x: Tensor, rule: str, g: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """[rows, cols] -> codes [rows, cols / 2], block scales [rows, cols / 16]."""
    blocks = x.view(x.shape[0], -1, BLOCK)
    amax = blocks.abs().amax(dim=-1)
    if rule == "native":
        scale = encode_e4m3((amax / E2M1_MAX).clamp(2.0**-16, E4M3_MAX).float())
        y = blocks.float() / (scale.float() + 1e-12).unsqueeze(-1)
        return nibbles(encode_e2m1(y, "away")), scale
    if rule == "four_over_six":
        return _four_over_six(blocks.float(), amax.float(), g)
    wide, wanted = blocks.float(), amax.float() / E2M1_MAX
    if rule == "ct":
        assert g is not None
        scale = encode_e4m3(g * (amax / E2M1_MAX).float())  # divided in the input's dtype, as compressed-tensors does
        scale = torch.where(scale.float() == 0, torch.tensor(0.125, device=x.device), scale.float())
        scale = scale.to(torch.float8_e4m3fn)
        y = wide / (scale.float() / g).unsqueeze(-1)
        return nibbles(encode_e2m1(y)), scale
    if g is not None:
        wanted = torch.where(g > 0, wanted / g, 0.0)  # g = 0 says that all is 0
    least = E4M3_NORMAL if rule == "torchao" else E4M3_TINY
    scale = encode_e4m3(wanted.clamp(min=least))
    if rule == "stochastic":
        scale = _not_below(scale, wanted)
    total = scale.float() if g is None else scale.float() * g
    if rule == "torchao":
        y = wide / total.unsqueeze(-1)
    else:  # one division a block; where the inverse would be infinite, values are as good as 0
        inverse = torch.where(total > 0, 1 / total, 0.0).clamp(max=torch.finfo(torch.float32).max)
        y = wide * inverse.unsqueeze(-1)
    if rule == "stochastic":
        assert noise is not None
        return nibbles(encode_e2m1(y, "stochastic", noise.view_as(y))), scale
    return nibbles(encode_e2m1(y)), scale


def _four_over_six(blocks: Tensor, amax: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each block scaled so that its largest value becomes 6, or 4 where the sum of squared errors is smaller then."""
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], device=blocks.device)
    second = torch.ones((), device=blocks.device) if g is None else g
    codes = scale = error = None
    for top in (6.0, 4.0):
        tried = encode_e4m3((amax / top / second).clamp(min=E4M3_TINY))
        total = (tried.float() * second).unsqueeze(-1)
        with_it = encode_e2m1(blocks / total)
        lost = (values[with_it.int()] * total - blocks).square_().sum(-1)
        if codes is None or scale is None or error is None:
            codes, scale, error = with_it, tried, lost
            continue
        better = lost < error
        codes = torch.where(better.unsqueeze(-1), with_it, codes)
        scale = torch.where(better, tried.view(torch.uint8), scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    assert codes is not None and scale is not None
    return nibbles(codes), scale


def _not_below(scale: Tensor, wanted: Tensor) -> Tensor:
    """The next E4M3 number up where rounding went below `wanted`; positive E4M3 bytes are in the order of their values."""
    byte = scale.view(torch.uint8)
    low = (scale.float() < wanted) & (byte < 0x7E)
    return (byte + low.to(torch.uint8)).view(torch.float8_e4m3fn)


def nibbles(codes: Tensor) -> Tensor:
    """codes [rows, blocks, 16] -> bytes [rows, cols / 2], even column in the low nibble."""
    flat = codes.view(codes.shape[0], -1, 2)
    return flat[..., 0] | (flat[..., 1] << 4)


def _pieces(rows: int, cols: int, device: torch.device):
    most = min(PIECE, CACHED) if device.type == "cpu" else PIECE
    step = max(1, most // max(cols, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
