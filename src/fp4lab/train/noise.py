"""Random numbers that depend on (seed, step, tensor, row, column) and on nothing else: not on chunks, order or device."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniform(seed: int, step: int, tensor: int, start: int, stop: int, cols: int, device: torch.device | str) -> Tensor:
    """fp32 in [0, 1), [stop - start, cols]: elements of the rows start..stop of one tensor's field.

    A counter hashed by two rounds of a 32-bit finaliser (Wellons' lowbias32 constants), in int64 so that the products of
    32-bit numbers are exact on every device.
    """
    index = torch.arange(start * cols, stop * cols, device=device, dtype=torch.int64)
    x = (index & _MASK) ^ _mix_int(seed * 0x9E3779B1 + step * 0x85EBCA77 + tensor * 0xC2B2AE3D + (1 << 20))
    x = _mix(x + (index >> 32))
    return ((x >> 8).float() * (1.0 / (1 << 24))).view(stop - start, cols)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) & _MASK
    x = _multiply(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _multiply(x, 0x846CA68B & 0x7FFFFFFF)
    return x ^ (x >> 16)


def _multiply(x: Tensor, factor: int) -> Tensor:
    return (x * factor) & _MASK  # both under 2**32 and 2**31: no overflow of int64


def _mix_int(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def round_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 -> bfloat16: up or down with the probability of the distance, decided by `noise` in [0, 1), like x.

    The 16 bits that bfloat16 lacks are a number of 1/65536ths of its step: `noise` is added there and the rest cut off. What
    is no finite number stays what it is.
    """
    carried = x.view(torch.int32) + (noise * 65536).to(torch.int32)
    rounded = (carried & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
