"""The one thing in which the paths differ: how y = x W^T is computed.

dense   W unquantised.
packed  W held as NVFP4, dequantised for the product (paths A and C).
ste     a float master; forward uses exactly the dequantised NVFP4 value, backward is the identity (path B).

`activations="nvfp4"` also rounds x to NVFP4 (W4A4). Devices without FP4 matrix units emulate that product
with the rounded values in the compute dtype, which differs from the real one only in the summation's rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4lab.nvfp4 import PackedTensor, pack, quantize_activations, scaled_fp4_matmul, unpack

ACTIVATIONS = ("none", "nvfp4")


def _round_input(x: Tensor, activations: str) -> Tensor:
    return x if activations == "none" else quantize_activations(x)


def packed_matmul(x: Tensor, p: PackedTensor, activations: str = "none", native: bool = False) -> Tensor:
    """x [..., in] times the transpose of p [out, in] -> [..., out] in x's dtype.

    `native` takes torch's scaled FP4 product (sm_100 and later; unconfirmed on hardware) and needs activations="nvfp4".
    """
    if native and activations == "nvfp4":
        flat = x.reshape(-1, x.shape[-1])
        return scaled_fp4_matmul(pack(flat, rule="torchao"), p, x.dtype).reshape(*x.shape[:-1], p.shape[0])
    return F.linear(_round_input(x, activations), unpack(p, x.dtype))


class DenseLinear(nn.Module):
    """R: the unquantised linear."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class PackedLinear(nn.Module):
    """C (and the linear of A): no float weight exists; nothing to train."""

    def __init__(self, packed: PackedTensor, activations: str = "none", native: bool = False):
        super().__init__()
        self.packed, self.activations, self.native = packed, activations, native

    def forward(self, x: Tensor) -> Tensor:
        return packed_matmul(x, self.packed, self.activations, self.native)


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantised value itself, not w + (dq - w), which rounds. Backward: identity to the master."""

    @staticmethod
    def forward(ctx, master: Tensor, quantised: Tensor) -> Tensor:
        return quantised.view_as(quantised)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None  # cast to the master's dtype by autograd


class SteLinear(nn.Module):
    """B: trains `weight` through `packed`, its NVFP4 image.

    The image is the store's own buffer: the checkpoint's codes until the master moves, then what the owner of the
    optimizer step wrote there. So B computes with exactly the codes of A and C, and nothing is quantised twice.
    `eval_cache` keeps the dequantised weight while gradients are off, until `clear_eval_cache`.
    Without `weight` it only evaluates.
    """

    def __init__(self, weight: nn.Parameter | None, packed: PackedTensor, activations: str = "none", eval_cache: bool = False):
        super().__init__()
        self.weight, self.packed = weight, packed
        self.activations, self.eval_cache = activations, eval_cache
        self._cached: Tensor | None = None

    def clear_eval_cache(self) -> None:
        self._cached = None

    def _quantised(self, dtype: torch.dtype) -> Tensor:
        caching = self.eval_cache and not torch.is_grad_enabled()
        if caching and self._cached is not None and self._cached.dtype == dtype:
            return self._cached
        value = unpack(self.packed, dtype)
        if caching:
            self._cached = value
        return value

    def forward(self, x: Tensor) -> Tensor:
        quantised = self._quantised(x.dtype)
        train = torch.is_grad_enabled() and self.weight is not None
        weight = _StraightThrough.apply(self.weight, quantised) if train else quantised
        rounded = _round_input(x, self.activations)
        if rounded is not x and x.requires_grad:  # straight through the activation's rounding too
            rounded = _StraightThrough.apply(x, rounded.detach())
        return F.linear(rounded, weight)
