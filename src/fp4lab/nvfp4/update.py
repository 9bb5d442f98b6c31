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

from fp4lab.nvfp4.codec import E2M1_MAX, E4M3_MAX, encode_e2m1, encode_e4m3, nibbles
from fp4lab.nvfp4.packed import BLOCK, PackedTensor

_TOP, _NAN, _HALF = 0x7E, 0x7F, 8  # bytes of 448 and NaN; one exponent step
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
