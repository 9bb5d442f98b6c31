"""Random numbers that depend on (seed, step, tensor, row, column) and on nothing else: not on chunks, order or device.

A 32-bit counter, one for every block of 16 columns of a row, is hashed (Wellons' lowbias32) under a key of seed, step and
tensor. The sixteen elements and the block take the top 19 bits of 20 bits of the hash times an odd number of their own: 19
bits, centred, are what fits beside a code's position in fp32 (`codec.encode_e2m1`), and a change of 2e-6 of a step between two
codes still has its chance. The same in kernels, whose integers have room for the 20 (`nvfp4.adamw_product`).
"""

import torch
from torch import Tensor

from fp4lab.nvfp4.packed import BLOCK
from fp4lab.nvfp4.update import HASH_BITS, LANES, MOMENT_LANES, SECOND_WORD

_MASK = 0xFFFFFFFF


def dither(key: int, start: int, stop: int, cols: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """For the rows start..stop of one tensor's field of `cols` (a multiple of 16) columns: fp32 in (0, 1),
    [stop - start, cols] for the elements and [stop - start, cols / 16] for the blocks."""
    mixed = _hashes(key, start, stop, cols, device)
    lanes = torch.tensor([*LANES[:8], *(lane * SECOND_WORD & _MASK for lane in LANES[:8])], device=device)
    return _uniform(mixed.unsqueeze(-1) * lanes).view(stop - start, cols), _uniform(mixed * LANES[8])


def moment_noise(key: int, start: int, stop: int, cols: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """The same for the blocks [stop - start, cols / 16] of m, their scales, those of v, and theirs."""
    mixed = _hashes(key, start, stop, cols, device)
    return tuple(_uniform(mixed * lane) for lane in MOMENT_LANES)


def _hashes(key: int, start: int, stop: int, cols: int, device: torch.device | str) -> Tensor:
    blocks = cols // BLOCK
    index = torch.arange(start * blocks, stop * blocks, device=device, dtype=torch.int64)
    return _mix((index & _MASK) ^ key).view(stop - start, blocks) & HASH_BITS


def key(seed: int, step: int, tensor: int) -> int:
    """32 bits for one tensor's field at one step."""
    return mix(mix(mix(seed) ^ step) + tensor)


def mix(x: int) -> int:
    """32 bits -> 32 bits, one to one."""
    x &= _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _uniform(product: Tensor) -> Tensor:
    return (((product & _MASK) >> 13).float() + 0.5) * 2.0**-19


def round_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 -> bfloat16: up or down with the probability of the distance, decided by `noise` in [0, 1), like x.

    The 16 bits that bfloat16 lacks are a number of 1/65536ths of its step: `noise` is added there and the rest cut off. What
    is no finite number stays what it is.
    """
    carried = x.view(torch.int32) + (noise * 65536).to(torch.int32)
    rounded = (carried & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
