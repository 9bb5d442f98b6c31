"""torch's own scaled FP4 product, for devices with FP4 matrix units (sm_100 and later).

Unconfirmed: nobody has run it on such a device for this project, so `backend.native_fp4` is off by default.
The operands' layout is tested on a CPU against the emulation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fp4lab.nvfp4.packed import PackedTensor
from fp4lab.nvfp4.swizzle import swizzle


class Operand(NamedTuple):
    """What `torch._scaled_mm` takes for one matrix."""

    codes: Tensor  # float4_e2m1fn_x2 [rows, cols / 2]
    scale: Tensor  # float8_e4m3fn, blocked layout


def native_available(device: torch.device | str) -> bool:
    """Whether the device has FP4 matrix units."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def operand(p: PackedTensor) -> Operand:
    """Views p's codes as FP4 pairs and brings its block scales into the blocked layout."""
    return Operand(p.codes.view(torch.float4_e2m1fn_x2), swizzle(p.block_scale))


def scaled_fp4_matmul(a: PackedTensor, b: PackedTensor, out_dtype: torch.dtype) -> Tensor:
    """a [M, K] times the transpose of b [N, K] -> [M, N]. Second-level scales multiply the result.

    Raises RuntimeError from torch on devices without FP4 matrix units.
    """
    left, right = operand(a), operand(b)
    out = torch._scaled_mm(left.codes, right.codes.t(), left.scale, right.scale, out_dtype=out_dtype)
    for p, by_row in ((a, True), (b, False)):
        if p.global_scale is not None:
            g = p.global_scale if by_row or not p.global_scale.ndim else p.global_scale.t()
            out = out / g if p.divide else out * g
    return out.to(out_dtype)
