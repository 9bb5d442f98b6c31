"""Where two packed tensors of one shape differ."""

import torch
from torch import Tensor

from fp4lab.nvfp4.packed import BLOCK, PackedTensor

ROWS = 1024  # compared at a time: bounds the scratch


def count_changed(a: PackedTensor, b: PackedTensor) -> Tensor:
    """Number of elements (int64 []) with another code or in a block with another scale. +0 and -0 are one code."""
    total = torch.zeros((), dtype=torch.int64, device=a.device)
    for start in range(0, a.codes.shape[0], ROWS):
        x, y = a.rows(start, start + ROWS), b.rows(start, start + ROWS)
        low, high = (_differ(x.codes & 15, y.codes & 15), _differ(x.codes >> 4, y.codes >> 4))
        rescaled = x.block_scale.view(torch.uint8) != y.block_scale.view(torch.uint8)
        pairs = rescaled.repeat_interleave(BLOCK // 2, dim=1)
        total += (low | pairs).count_nonzero() + (high | pairs).count_nonzero()
    return total


def _differ(x: Tensor, y: Tensor) -> Tensor:
    return (x != y) & (((x | y) & 7) != 0)
