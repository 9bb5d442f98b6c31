"""Where two packed tensors of one shape differ."""

import torch
from torch import Tensor

from fp4lab.nvfp4.packed import BLOCK, PackedTensor

ROWS = 1024  # compared at a time: bounds the scratch
LOW, HIGH = 0x07, 0x70  # magnitude bits of a byte's two codes


def count_changed(a: PackedTensor, b: PackedTensor) -> Tensor:
    """Number of elements (int64 []) with another code or in a block with another scale. +0 and -0 are one code."""
    total = torch.zeros((), dtype=torch.int64, device=a.device)
    for start in range(0, a.codes.shape[0], ROWS):
        x, y = a.codes[start : start + ROWS], b.codes[start : start + ROWS]
        scales = [p.block_scale[start : start + ROWS].view(torch.uint8) for p in (a, b)]
        rescaled = (scales[0] != scales[1]).repeat_interleave(BLOCK // 2, dim=1)
        for magnitude, sign in ((LOW, 0x08), (HIGH, 0x80)):
            differ = ((x ^ y) & (magnitude | sign) != 0) & ((x | y) & magnitude != 0)
            total += (differ | rescaled).count_nonzero()
    return total


def keep_zero_signs(new: PackedTensor, old: PackedTensor) -> None:
    """Codes of `new` that are 0 take the sign they had in `old`, if they were 0 there; in place.

    Arithmetic on a float master loses it (-0 - -0 is +0), and an export of untouched weights would not be the same bytes.
    """
    for start in range(0, new.codes.shape[0], ROWS):
        x, y = new.codes[start : start + ROWS], old.codes[start : start + ROWS]
        both = x | y
        kept = (both & LOW == 0).to(torch.uint8) * 0x0F | (both & HIGH == 0).to(torch.uint8) * 0xF0
        x ^= (x ^ y) & kept
