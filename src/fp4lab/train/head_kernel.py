"""Triton kernels of a vocabulary chunk's cross-entropy: what `fused` says in plain torch, a pass over the logits each.

Everything between reading and writing is fp32. tests/gpu/test_head_kernel.py holds them to torch's own.
"""

import torch
from torch import Tensor

from fp4lab.nvfp4 import kernels


def take(x: Tensor) -> bool:
    """Whether these kernels run for logits like x."""
    return x.dtype == torch.bfloat16 and kernels.available(x.device)


def add_chunk(logits: Tensor, targets: Tensor, start: int, lse: Tensor, right: Tensor) -> None:
    """Takes the logits [N, C] of the ids from `start` on into lse [N] and right [N], fp32, in place.

    lse    log of the sum of exponentials of the chunks so far; right: the target's logit, once its chunk was there
    """
    n, cols = logits.shape
    width = kernels.triton.next_power_of_2(cols)
    _add_chunk[(n,)](logits, targets, lse, right, start, cols, C=width, num_warps=8)


def softmax_grad_(logits: Tensor, targets: Tensor, start: int, lse: Tensor, scale: Tensor) -> Tensor:
    """(softmax - one-hot) * scale, written over the logits [N, C]; scale [N, 1] fp32."""
    n, cols = logits.shape
    width = kernels.triton.next_power_of_2(cols)
    _softmax_grad[(n,)](logits, targets, lse, scale, start, cols, C=width, num_warps=8)
    return logits


if kernels.triton is not None:
    from fp4lab.nvfp4.kernels import tl, triton

    @triton.jit(do_not_specialize=["start"])
    def _add_chunk(logits, targets, lse, right, start, cols, C: tl.constexpr):
        row, at = tl.program_id(0), tl.arange(0, C)
        x = tl.load(logits + row.to(tl.int64) * cols + at, mask=at < cols, other=float("-inf")).to(tl.float32)
        top = tl.max(x, axis=0)
        here, before = top + tl.log(tl.sum(tl.exp(x - top), axis=0)), tl.load(lse + row)
        most = tl.maximum(here, before)
        tl.store(lse + row, most + tl.log(tl.exp(here - most) + tl.exp(before - most)))
        target = (tl.load(targets + row) - start).to(tl.int32)
        found = tl.sum(tl.where(at == target, x, 0.0), axis=0)
        tl.store(right + row, found, mask=(target >= 0) & (target < cols))

    @triton.jit(do_not_specialize=["start"])
    def _softmax_grad(logits, targets, lse, scale, start, cols, C: tl.constexpr):
        row, at = tl.program_id(0), tl.arange(0, C)
        place = logits + row.to(tl.int64) * cols + at
        x = tl.load(place, mask=at < cols, other=float("-inf")).to(tl.float32)
        target = (tl.load(targets + row) - start).to(tl.int32)
        p = (tl.exp(x - tl.load(lse + row)) - (at == target).to(tl.float32)) * tl.load(scale + row)
        tl.store(place, p.to(logits.dtype.element_ty), mask=at < cols)
