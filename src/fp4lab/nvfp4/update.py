"""Moving a packed tensor by a little: stochastic rounding that touches only what the change asks for.

Packing anew would take new block scales from new maxima, and a scale that moves by one E4M3 step rounds all 16 values of its
block again: noise far above a small update. Here the old scale stays unless the block outgrows it. Then scale and largest
value move together, with the probability that makes every value right on average:

lo, hi    the E4M3 neighbours around amax / 6; t = 6 (lo + u (hi - lo)), u the block's own noise
size > t  such values become 6 hi, and the block's scale hi if there are any: a value above 6 lo does with the probability of
          its excess, the largest with the probability that the scale moves
else      what lies above 6 lo is 6 lo; so E[x] = x in every case
halving   a block whose largest value is at most 3 scales is held by half the scale exactly

A row's second-level scale doubles when a block outgrows 448 (its block scales halve, exactly unless they are below 2^-5). A
per-tensor second-level scale never moves: such a block clips. An unchanged tensor stays byte for byte what it is.
"""

import torch
from torch import Tensor

from fp4lab.nvfp4.codec import E2M1_MAX, E4M3_MAX, E4M3_NORMAL, E4M3_TINY, encode_e2m1, encode_e4m3, nibbles
from fp4lab.nvfp4.packed import BLOCK, PackedTensor

# Of a hash, for eight elements, their block and the block's other eight: odd, random bits (`train.noise`).
LANES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09, 0x8CB92BA7)
SECOND_WORD = 0xA3D95FA7
MOMENT_LANES = (0x7F4A7C15, 0x94D049BB, 0xBF58476D, 0xD1B54A33)  # the same for m's block and its scale, for v's and its
HASH_BITS = 0xFFFFF000  # of the hash: then a code's position and the noise below it never add up to the next power of two
_TOP, _NAN, _HALF = 0x7E, 0x7F, 8  # bytes of 448 and NaN; one exponent step
_FRACTION = 1 << 20  # of an E4M3 step, in the bits of a float
_EXACT_HALF = 2 * _HALF  # normal numbers from here on stay normal when halved


def update_stochastic(x: Tensor, old: PackedTensor, noise: Tensor, block_noise: Tensor) -> PackedTensor:
    """x, fp32 [rows, cols], stored where `old` was. New tensors; `old` is not written. A block with a NaN or an infinity gets
    the scale NaN.

    noise        uniform in [0, 1), [rows, padded cols]
    block_noise  uniform in [0, 1), [rows, padded cols / 16]
    """
    rows, padded = noise.shape
    if x.shape[1] != padded:
        x = torch.nn.functional.pad(x, (0, padded - x.shape[1]))
    blocks = x.view(rows, -1, BLOCK)
    byte = old.block_scale.view(torch.uint8)
    second, byte = _make_room(blocks, byte, old)
    unit = 1.0 if second is None else second.unsqueeze(-1) if old.divide else 1 / second.unsqueeze(-1)
    y = blocks * unit
    size = y.abs()
    amax = size.amax(dim=-1)
    wanted = amax / E2M1_MAX
    byte = torch.where((wanted <= _value(byte) / 2) & (byte >= _EXACT_HALF), byte - _HALF, byte)
    grows = wanted > _value(byte)
    low = torch.where(grows, _floor(wanted), byte)
    lo, hi = _value(low), _value((low + 1).clamp(max=_TOP))
    limit = torch.where(grows, E2M1_MAX * (lo + block_noise * (hi - lo)), torch.inf)
    new_byte = torch.where(amax > limit, (low + 1).clamp(max=_TOP), low)
    inverse = torch.where(new_byte > 0, 1 / _value(new_byte), 0.0).unsqueeze(-1)
    units = torch.minimum(size, (E2M1_MAX * lo).unsqueeze(-1)) * inverse
    codes = encode_e2m1(torch.copysign(units, y), "stochastic", noise.view_as(y))
    codes = torch.where(size > limit.unsqueeze(-1), codes | 7, codes)
    new_byte = torch.where(amax.isfinite(), new_byte, _NAN)  # codes have no NaN, and the comparisons would make it a plain 0
    return PackedTensor(
        nibbles(codes), new_byte.view(torch.float8_e4m3fn), _shaped(second, old), (rows, old.shape[-1]), old.divide
    )


def pack_stochastic(x: Tensor, bound: Tensor, noise: Tensor, scale_noise: Tensor) -> PackedTensor:
    """x, fp32 [rows, cols], as a running mean is stored: under second-level scales `bound` [rows, 1] that are given, each value
    right on average. Rounded to nearest, a mean that moves by less than half a step a time would never move.

    Values are taken in units of their block's exact scale, a sixth of its largest, and rounded; so is the scale, by noise of
    its own. A product of two that are right on average is so too, nothing clips, and a block that grows or shrinks by little
    keeps its codes. Scales are at least 2^-9, and values below that in units of it.

    noise        uniform in [0, 1), [rows, padded cols / 16]: one number for the values of a block, which go up or down together
    scale_noise  the same for block scales
    """
    rows, cols = x.shape
    padded = noise.shape[1] * BLOCK
    if cols != padded:
        x = torch.nn.functional.pad(x, (0, padded - cols))
    blocks = x.view(rows, -1, BLOCK)
    amax = blocks.abs().amax(dim=-1)
    wanted = torch.where(bound > 0, amax / E2M1_MAX / bound, 0.0)  # 0 says that all is 0
    byte = _scale_byte(wanted.nan_to_num(E4M3_MAX), (scale_noise * _FRACTION).to(torch.int32))
    inverse = torch.minimum(E2M1_MAX / amax, torch.where(bound > 0, 1 / (E4M3_TINY * bound), 0.0))
    codes = encode_e2m1(blocks * inverse.unsqueeze(-1), "stochastic", noise.unsqueeze(-1))
    return PackedTensor(nibbles(codes), byte.view(torch.float8_e4m3fn), bound, (rows, cols))


def _scale_byte(x: Tensor, fraction: Tensor) -> Tensor:
    """E4M3 bytes of x >= 0, at least 2^-9: x plus so many 2^20ths of its step, cut off. Below 2^-6 steps are those of 2^-6."""
    small = x < E4M3_NORMAL
    bits = torch.where(small, x + E4M3_NORMAL, x).clamp(max=E4M3_MAX).view(torch.int32) + fraction
    byte = (bits >> 20) - torch.where(small, 968, 960)
    return byte.clamp(1, _TOP).to(torch.uint8)


def _make_room(blocks: Tensor, byte: Tensor, old: PackedTensor) -> tuple[Tensor | None, Tensor]:
    """The second-level scale as [] or [rows, 1], doubled in rows that outgrow it, and the block scales halved there."""
    second = old.global_scale
    if second is None or not second.ndim:
        return second, byte
    amax = blocks.abs().amax(dim=(1, 2)).unsqueeze(1)
    largest = (amax * second if old.divide else amax / second) / E2M1_MAX
    full = largest > E4M3_MAX
    halved = encode_e4m3(_value(byte) / 2).view(torch.uint8)
    factor = torch.where(full, 0.5 if old.divide else 2.0, 1.0)
    return second * factor, torch.where(full, halved, byte)


def _shaped(second: Tensor | None, old: PackedTensor) -> Tensor | None:
    return None if second is None or old.global_scale is None else second.view(old.global_scale.shape)


def _value(byte: Tensor) -> Tensor:
    return byte.view(torch.float8_e4m3fn).float()


def _floor(x: Tensor) -> Tensor:
    """Byte of the largest E4M3 number that is at most x >= 0."""
    byte = encode_e4m3(x).view(torch.uint8)
    return torch.where((_value(byte) > x) & (byte > 0), byte - 1, byte)
