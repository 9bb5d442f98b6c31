"""A master of 12.5 bits: the NVFP4 codes that the forward reads, and beside each an int8 of what rounding left over.

value = image + r * unit        unit = half the width of the code's own cell / 127, in the scale of its block

No scale is stored: rounding to nearest leaves at most half a cell, and a cell is 1/2, 1 or 2 block scales wide as its code is
below 2, below 4 or above. So an element's unit follows from its code and block scale, and small values have a finer one than
the large of their block, which no scale per block or row can give (measured: experiments/state-formats/residual_scale.py).
Where the block scale is subnormal, E4M3 rounds it by more than 1/16 and cells overflow: there units are four times as wide.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fp4lab.nvfp4 import PackedTensor, unpack
from fp4lab.nvfp4.codec import E4M3_NORMAL, E4M3_TINY

TOP = 127
_CELL = (1, 1, 1, 1, 2, 2, 4, 4) * 2  # code -> code of its cell's width: 0.5, 1 or 2; signs do not matter


@lru_cache(maxsize=8)
def _cells(device: torch.device) -> Tensor:
    """uint8 [256]: a byte of two codes -> the byte of their cells' widths."""
    return torch.tensor([_CELL[byte & 15] | _CELL[byte >> 4] << 4 for byte in range(256)], dtype=torch.uint8, device=device)


def units(image: PackedTensor) -> Tensor:
    """Value of one step of the residual, fp32 [rows, cols]."""
    scale = image.block_scale.float()
    scale = torch.where(scale < E4M3_NORMAL, 4 * scale.clamp(min=E4M3_TINY), scale)  # E4M3 holds both
    widths = _cells(image.device)[image.codes.int()]
    parts = PackedTensor(widths, scale.to(torch.float8_e4m3fn), image.global_scale, image.shape, image.divide)
    return unpack(parts) * (0.5 / TOP)


def decode(image: PackedTensor, residual: Tensor) -> Tensor:
    """fp32 [rows, cols]."""
    return unpack(image) + residual.float() * units(image)


def encode(value: Tensor, image: PackedTensor, noise: Tensor | float = 0.5) -> Tensor:
    """What `image` lacks of the fp32 `value` [rows, cols], int8.

    noise  uniform in [0, 1), [rows, cols]: stochastic, right on average; 0.5: to nearest.
    """
    unit = units(image)
    steps = torch.where(unit > 0, (value - unpack(image)) / unit, 0.0)
    return (steps + noise).floor().clamp(-TOP, TOP).to(torch.int8)
