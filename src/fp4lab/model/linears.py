"""The one thing in which the paths differ: how y = x W^T is computed.

dense   W unquantised.
packed  W held as NVFP4, dequantised for the product (paths A and C).
ste     a float master; forward uses exactly the dequantised NVFP4 value, backward is the identity (path B).
consume the same without a master: the gradient is handed on at once (path B, step=fused).

`activations="nvfp4"` also rounds x to NVFP4 (W4A4). Devices without FP4 matrix units emulate that product
with the rounded values in the compute dtype, which differs from the real one only in the summation's rounding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4lab.model import kernels
from fp4lab.model.layers import joint_silu_mul
from fp4lab.nvfp4 import PackedTensor, decode, matmul, matmul_back, pack, quantize_activations, scaled_fp4_matmul, unpack

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
    return matmul(_round_input(x, activations), p)


def lookup(table: "Tensor | PackedTensor", ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` of an embedding [V, H] in `dtype`, [..., H]; of a packed one only these rows are decoded."""
    if isinstance(table, Tensor):
        return F.embedding(ids, table).to(dtype)
    at, second = ids.reshape(-1), table.global_scale
    rows = PackedTensor(
        table.codes[at],
        table.block_scale.view(torch.uint8)[at].view(torch.float8_e4m3fn),
        second[at] if second is not None and second.ndim else second,
        (len(at), table.shape[1]),
        table.divide,
    )
    return unpack(rows, dtype).view(*ids.shape, table.shape[1])


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


class _Consumed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, linear: "ConsumingLinear") -> Tensor:
        rounded = _round_input(x, linear.activations)
        ctx.linear = linear
        ctx.save_for_backward(rounded)
        if linear.again and linear.last:  # the input is what was wanted
            return x.new_empty(*x.shape[:-1], linear.packed.shape[0])
        if linear.again:
            linear.decoded = decode(rounded, linear.packed)
        return matmul(rounded, linear.packed, linear.decoded)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,), linear = ctx.saved_tensors, ctx.linear
        decoded, linear.decoded = linear.decoded, None
        dx = matmul_back(dy, linear.packed, decoded) if ctx.needs_input_grad[0] else None
        del decoded  # before a gradient as large exists
        if not linear.frozen:
            assert linear.consume is not None, "nobody takes this linear's gradient"
            linear.consume(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
        return dx, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up and `_Consumed` of it, on a GPU: gate and up alone are kept, and gradients are written over them."""

    @staticmethod
    def forward(ctx, both: Tensor, linear: "ConsumingLinear") -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(both)
        if linear.again and linear.last:
            return both.new_empty(*both.shape[:-1], linear.packed.shape[0])
        return packed_matmul(kernels.gated(both), linear.packed, linear.activations)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (both,), linear = ctx.saved_tensors, ctx.linear
        x = matmul_back(dy, linear.packed)
        kernels.gate_back_(both, x)
        if not linear.frozen:
            assert linear.consume is not None, "nobody takes this linear's gradient"
            rounded = _round_input(x, linear.activations)
            linear.consume(dy.reshape(-1, dy.shape[-1]), rounded.reshape(-1, x.shape[-1]))
        return both, None


class ConsumingLinear(nn.Module):
    """B without a float parameter: the packed weight is all that it reads; a master, if any, is the optimizer's.

    Forward and backward dequantise it for one product each. The two factors of the dequantised weight's gradient, dy [N, out]
    and x [N, in] in the compute dtype, go to `consume` after the input's gradient; the gradient itself is never kept.
    """

    def __init__(self, packed: PackedTensor, activations: str = "none", members: tuple[str, ...] = ()):
        """`members`: names of the parameters whose rows these are, where they are several."""
        super().__init__()
        self.packed, self.activations, self.members = packed, activations, members
        self.consume: Callable[[Tensor, Tensor], None] | None = None
        self.frozen = False  # has no gradient to hand over
        self.again = False  # computed a second time, for a backward that follows at once
        self.last = False  # of what is computed again: nobody reads its output then
        self.decoded: Tensor | None = None  # the weight, between the two

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _Consumed.apply(x, self)
        return packed_matmul(x, self.packed, self.activations)

    def gated(self, both: Tensor) -> Tensor:
        """Of silu(gate) * up, both [..., 2 I] in one tensor, which nothing else may read: gradients are written over it."""
        if kernels.take(both) and torch.is_grad_enabled() and both.requires_grad:
            return _Gated.apply(both.contiguous(), self)
        return self(joint_silu_mul(both))


class _Looked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor: Tensor, ids: Tensor, embedding: "ConsumingEmbedding") -> Tensor:
        ctx.embedding = embedding
        ctx.save_for_backward(ids)
        return lookup(embedding.weight, ids, embedding.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (ids,), embedding = ctx.saved_tensors, ctx.embedding
        assert embedding.consume is not None, "nobody takes the embedding's gradient"
        embedding.consume(ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
        return None, None, None


class ConsumingEmbedding(nn.Module):
    """An embedding [V, H] whose gradient goes to `consume` as (ids [N], rows [N, H]), not as a table of its size."""

    def __init__(self, weight: "nn.Parameter | PackedTensor", dtype: torch.dtype):
        super().__init__()
        self.weight, self.dtype = weight, dtype
        self.consume: Callable[[Tensor, Tensor], None] | None = None
        self.frozen = False  # has no gradient to hand over
        self.looked: list[Tensor] = []  # ids whose gradients will come, as the optimizer's step begins
        # autograd follows inputs that want gradients, and ids are none
        self.register_buffer("anchor", torch.zeros((), device=weight.device, requires_grad=True), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.frozen:
            self.looked.append(ids)
            return _Looked.apply(self.anchor, ids, self)
        return lookup(self.weight, ids, self.dtype)
