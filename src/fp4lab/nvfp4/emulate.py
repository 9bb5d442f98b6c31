"""NVFP4 activations without FP4 matrix units: round to the format, multiply in the compute dtype."""

import torch
from torch import Tensor

from fp4lab.nvfp4.codec import pack
from fp4lab.nvfp4.dispatch import unpack


def quantize_activations(x: Tensor, rule: str = "torchao") -> Tensor:
    """x [..., K] rounded to NVFP4 in blocks of 16 along K, single-level scales, in x's shape and dtype."""
    flat = x.detach().reshape(-1, x.shape[-1])
    return unpack(pack(flat, rule), torch.float32).to(x.dtype).view(x.shape)
