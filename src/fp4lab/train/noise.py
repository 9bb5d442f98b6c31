"""Random numbers that depend on (seed, step, tensor, row, column) and on nothing else: not on chunks, order or device.

A 32-bit counter, one for every eight columns of a row, is hashed (Wellons' lowbias32) under a key of seed, step and tensor;
the eight elements and the block of 16 take the top 19 bits of the hash times an odd number of their own. 19 bits, centred, are
what fits beside a code's position in fp32 (`codec.encode_e2m1`): a change of 2e-6 of a step between two codes still has its
chance. The same in Triton, whose integers have room for 28 bits (`nvfp4.adamw_kernel`).
"""

import torch
from torch import Tensor

from fp4lab.nvfp4.adamw_kernel import LANES

_MASK = 0xFFFFFFFF


def dither(key: int, start: int, stop: int, cols: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """For the rows start..stop of one tensor's field of `cols` (a multiple of 16) columns: fp32 in (0, 1),
    [stop - start, cols] for the elements and [stop - start, cols / 16] for the blocks."""
    words = cols // 8
    index = torch.arange(start * words, stop * words, device=device, dtype=torch.int64)
    mixed = _mix((index & _MASK) ^ key).view(stop - start, words)
    lanes = torch.tensor(LANES, device=device)
    elements = _uniform(mixed.unsqueeze(-1) * lanes[:8])
    return elements.view(stop - start, cols), _uniform(mixed[:, ::2] * lanes[8])


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
