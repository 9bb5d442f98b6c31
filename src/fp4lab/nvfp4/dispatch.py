"""Where a kernel exists for a device it runs, else the codec; both give the same bits."""

import torch
from torch import Tensor

from fp4lab.nvfp4 import codec, kernels, matmul_kernel
from fp4lab.nvfp4.packed import PackedTensor


def unpack(p: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [*p.shape] in `dtype`, computed in fp32 and rounded once."""
    return kernels.unpack(p, dtype) if kernels.available(p.device) else codec.unpack(p, dtype)


def matmul(x: Tensor, p: PackedTensor) -> Tensor:
    """x [..., in] times the transpose of p [out, in] -> [..., out] in x's dtype; few tokens read the codes alone."""
    flat = x.reshape(-1, x.shape[-1])
    if matmul_kernel.takes(flat, p):
        return matmul_kernel.matmul(flat, p).view(*x.shape[:-1], p.shape[0])
    return torch.nn.functional.linear(x, unpack(p, x.dtype))


def matmul_transposed(x: Tensor, p: PackedTensor) -> Tensor:
    """x [..., out] times p [out, in] -> [..., in] in x's dtype: the gradient of the input."""
    flat = x.reshape(-1, x.shape[-1])
    if matmul_kernel.takes(flat, p):
        return matmul_kernel.matmul_transposed(flat, p).view(*x.shape[:-1], p.shape[1])
    return x @ unpack(p, x.dtype)
