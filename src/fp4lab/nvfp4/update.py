"""Moving a packed tensor by a little: stochastic rounding that touches only what the change asks for.

Packing anew would take new block scales from new maxima, and a scale that moves by one E4M3 step rounds all 16 values of its
block again: noise far above a small update. Here the old scale stays unless the block outgrows it. Then scale and largest
value move together, with the probability that makes every value right on average:

lo, hi    the E4M3 neighbours around amax / 6; hi is taken with p = (amax / 6 - lo) / (hi - lo)
lo taken  what lies above 6 lo becomes 6 lo
hi taken  a value x above 6 lo becomes 6 hi with (x / 6 - lo) / (hi - lo) / p, else it is 6 lo rounded on hi's grid
          so E[x] = x in either case; the largest goes to 6 hi for sure
halving   a block whose largest value is at most 3 scales is held by half the scale exactly

A row's second-level scale doubles when a block outgrows 448 (its block scales halve, exactly unless they are below 2^-5). A
per-tensor second-level scale never moves: such a block clips. An unchanged tensor stays byte for byte what it is.
"""

import torch
from torch import Tensor

from fp4lab.nvfp4.codec import E2M1_MAX, E4M3_MAX, encode_e2m1, encode_e4m3, nibbles
from fp4lab.nvfp4.packed import BLOCK, PackedTensor

_TOP, _HALF = 0x7E, 8  # byte of 448; one exponent step in bytes
_EXACT_HALF = 2 * _HALF  # normal numbers from here on stay normal when halved


def update_stochastic(x: Tensor, old: PackedTensor, noise: Tensor, block_noise: Tensor) -> PackedTensor:
    """x, fp32 [rows, cols], stored where `old` was. New tensors; `old` is not written.

    noise        uniform in [0, 1), [rows, padded cols]
    block_noise  uniform in [0, 1), [rows, padded cols / 16]
    """
    rows, padded = noise.shape
    if x.shape[1] != padded:
        x = torch.nn.functional.pad(x, (0, padded - x.shape[1]))
    blocks = x.view(rows, -1, BLOCK)
    byte = old.block_scale.view(torch.uint8)
    second, byte = _make_room(blocks, byte, old)
    y = blocks if second is None else blocks * second.unsqueeze(-1) if old.divide else blocks / second.unsqueeze(-1)
    size = y.abs()
    wanted = size.amax(dim=-1) / E2M1_MAX
    scale = _value(byte)
    byte = torch.where((wanted <= scale / 2) & (byte >= _EXACT_HALF), byte - _HALF, byte)
    scale = _value(byte)
    grows = wanted > scale
    low = torch.where(grows, _floor(wanted), byte)
    lo, hi = _value(low), _value((low + 1).clamp(max=_TOP))
    p = torch.where(grows, ((wanted - lo) / (hi - lo).clamp(min=2.0**-9)).clamp(0, 1), 0.0)
    up = block_noise < p
    new_byte = torch.where(up, low + 1, low).clamp(max=_TOP)
    new_scale = _value(new_byte).unsqueeze(-1)
    # values above 6 lo decide between 6 lo and 6 hi with what is left of the block's own decision
    above = ((size / E2M1_MAX - lo.unsqueeze(-1)) / (hi - lo).clamp(min=2.0**-9).unsqueeze(-1)).clamp(0, 1)
    share = torch.where(up.unsqueeze(-1), above / p.clamp(min=1e-30).unsqueeze(-1), 0.0).clamp(max=1)
    u = noise.view_as(y)
    to_top = u < share
    u = torch.where(to_top, 0.0, (u - share) / (1 - share).clamp(min=2.0**-24)).clamp(0, 1 - 2.0**-24)
    size = torch.where(to_top, E2M1_MAX * new_scale, torch.minimum(size, E2M1_MAX * lo.unsqueeze(-1)))
    units = torch.where(new_scale > 0, size / new_scale, 0.0)
    codes = encode_e2m1(torch.copysign(units, y), "stochastic", u)
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
