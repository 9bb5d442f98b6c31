"""Where a kernel exists for a device and a shape it runs, else the codec and torch's products.

Unpacked values are the same bits either way; products differ in the order of their sums.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4lab.nvfp4 import codec, kernels, product_kernel
from fp4lab.nvfp4.packed import PackedTensor


def unpack(p: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [*p.shape] in `dtype`, computed in fp32 and rounded once."""
    return kernels.unpack(p, dtype) if kernels.available(p.device) else codec.unpack(p, dtype)


def decode(x: Tensor, p: PackedTensor) -> Tensor | None:
    """The values of p that a product with x [..., in] would decode first; None where it decodes on the way."""
    rows = x.numel() // x.shape[-1]
    return None if product_kernel.why_not(p, x.dtype, rows) is None else unpack(p, x.dtype)


def matmul(x: Tensor, p: PackedTensor, decoded: Tensor | None = None) -> Tensor:
    """x [..., in] times the transpose of p [out, in] -> [..., out] in x's dtype. `decoded`: what `decode` gave."""
    flat = x.reshape(-1, x.shape[-1])
    if decoded is None and product_kernel.why_not(p, x.dtype, len(flat)) is None:
        return product_kernel.product(flat.contiguous(), p).view(*x.shape[:-1], p.shape[0])
    return F.linear(x, unpack(p, x.dtype) if decoded is None else decoded)


def matmul_back(dy: Tensor, p: PackedTensor, decoded: Tensor | None = None) -> Tensor:
    """dy [..., out] times p [out, in] -> [..., in] in dy's dtype: what `matmul` hands back to x."""
    flat = dy.reshape(-1, dy.shape[-1])
    if decoded is None and product_kernel.why_not(p, dy.dtype, len(flat)) is None:
        return product_kernel.product_back(flat.contiguous(), p).view(*dy.shape[:-1], p.shape[1])
    return dy @ (unpack(p, dy.dtype) if decoded is None else decoded)


def describe(matrices: Iterable[PackedTensor], device: torch.device, dtype: torch.dtype) -> str:
    """Which paths decode and multiply on this device, for the records."""
    said = kernels.describe(device)
    return f"{said}; {product_kernel.describe(matrices, dtype)}" if kernels.available(device) else said
