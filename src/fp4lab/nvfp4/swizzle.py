"""The block-scale layout of NVIDIA's scaled FP4 product (cuBLAS "blocked" layout; reference section 2.4)."""

import torch
from torch import Tensor


def swizzle(scale: Tensor) -> Tensor:
    """[rows, cols] plain block scales -> flat blocked layout, padded with zeros to rows % 128 == 0, cols % 4 == 0."""
    data = scale.view(torch.uint8)
    rows, cols = data.shape
    r, c = -(-rows // 128) * 128, -(-cols // 4) * 4
    padded = torch.zeros(r, c, dtype=torch.uint8, device=data.device)
    padded[:rows, :cols] = data
    tiles = padded.view(r // 128, 128, c // 4, 4).permute(0, 2, 1, 3).reshape(-1, 4, 32, 4)
    return tiles.transpose(1, 2).reshape(-1).view(scale.dtype)


def unswizzle(flat: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse: blocked layout -> [rows, cols]."""
    r, c = -(-rows // 128) * 128, -(-cols // 4) * 4
    tiles = flat.view(torch.uint8).view(-1, 32, 4, 4).transpose(1, 2).reshape(r // 128, c // 4, 128, 4)
    return tiles.permute(0, 2, 1, 3).reshape(r, c)[:rows, :cols].contiguous().view(flat.dtype)
