"""Where a kernel exists for a device it runs, else the codec; both give the same bits."""

import torch
from torch import Tensor

from fp4lab.nvfp4 import codec, kernels
from fp4lab.nvfp4.packed import PackedTensor


def unpack(p: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [*p.shape] in `dtype`, computed in fp32 and rounded once."""
    return kernels.unpack(p, dtype) if kernels.available(p.device) else codec.unpack(p, dtype)
