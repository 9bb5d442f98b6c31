"""Where two packed tensors of one shape differ."""

import torch
from torch import Tensor

from fp4lab.nvfp4.packed import BLOCK, PackedTensor

ROWS = 1024  # compared at a time: bounds the scratch


def count_changed(a: PackedTensor, b: PackedTensor) -> Tensor:
    """Number of elements (int64 []) with another code or in a block with another scale. +0 and -0 are one code."""
    total = torch.zeros((), dtype=torch.int64, device=a.device)
    for start in range(0, a.codes.shape[0], ROWS):
        x, y = a.codes[start : start + ROWS], b.codes[start : start + ROWS]
        low, high = _differ(x & 15, y & 15), _differ(x >> 4, y >> 4)
        scales = [p.block_scale[start : start + ROWS].view(torch.uint8) for p in (a, b)]
        rescaled = scales[0] != scales[1]
        pairs = rescaled.repeat_interleave(BLOCK // 2, dim=1)
        total += (low | pairs).count_nonzero() + (high | pairs).count_nonzero()
    return total


def _differ(x: Tensor, y: Tensor) -> Tensor:
    return (x != y) & (((x | y) & 7) != 0)
