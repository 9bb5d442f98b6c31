"""Triton kernels of a vocabulary chunk's cross-entropy: what `fused` says in plain torch, a pass over the logits each.

Everything between reading and writing is fp32. tests/gpu/test_head_kernel.py holds them to torch's own.
"""

import torch
from torch import Tensor

from fp4lab.nvfp4 import kernels

WIDTH = 8192  # logits of a position that one program takes


def take(x: Tensor) -> bool:
    """Whether these kernels run for logits like x."""
    return x.dtype == torch.bfloat16 and kernels.available(x.device)


def add_chunk(logits: Tensor, targets: Tensor, start: int, lse: Tensor, right: Tensor) -> None:
    """Takes the logits [N, C] of the ids from `start` on into lse [N] and right [N], fp32, in place.

    lse    log of the sum of exponentials of the chunks so far; right: the target's logit, once its chunk was there
    """
    n, cols = logits.shape
    parts = -(-cols // WIDTH)
    each = torch.empty(n, parts, dtype=torch.float32, device=logits.device)
    _sum_part[(n, parts)](logits, targets, each, right, start, cols, parts, C=WIDTH, num_warps=8)
    _add_parts[(n,)](each, lse, parts, C=kernels.triton.next_power_of_2(parts), num_warps=1)


def softmax_grad_(logits: Tensor, targets: Tensor, start: int, lse: Tensor, scale: Tensor) -> Tensor:
    """(softmax - one-hot) * scale, written over the logits [N, C]; scale [N, 1] fp32."""
    n, cols = logits.shape
    _softmax_grad[(n, -(-cols // WIDTH))](logits, targets, lse, scale, start, cols, C=WIDTH, num_warps=8)
    return logits


def take_rows_(kept: Tensor, names: Tensor, grad: Tensor, start: int) -> None:
    """Copies that row of grad [C, H], the ids from `start` on, which names [N] (int32) has for a row of kept [N, H], if it is
    there."""
    n, width = kept.shape
    _take_rows[(n,)](kept, names, grad, start, len(grad), width, H=kernels.triton.next_power_of_2(width), num_warps=4)


def add_rows_(grad: Tensor, start: int, ids: Tensor, order: Tensor, rows: Tensor) -> None:
    """Adds each of rows [N, H] to that row of grad [C, H], the ids from `start` on, which its id names, if it is there.

    ids [N] ascending, order [N] the rows they belong to. Rows of one id are added up in fp32, in that order: the same bits
    every time, as those of index_add_ are not.
    """
    n, width = rows.shape
    _add_rows[(n,)](grad, ids, order, rows, start, len(grad), n, width, H=kernels.triton.next_power_of_2(width), num_warps=4)


if kernels.triton is not None:
    from fp4lab.nvfp4.kernels import tl, triton

    @triton.jit(do_not_specialize=["start"])
    def _sum_part(logits, targets, each, right, start, cols, parts, C: tl.constexpr):
        row, part = tl.program_id(0), tl.program_id(1)
        at = part * C + tl.arange(0, C)
        x = tl.load(logits + row.to(tl.int64) * cols + at, mask=at < cols, other=float("-inf")).to(tl.float32)
        top = tl.max(x, axis=0)
        tl.store(each + row * parts + part, top + tl.log(tl.sum(tl.exp(x - top), axis=0)))
        target = (tl.load(targets + row) - start).to(tl.int32)
        found = tl.sum(tl.where(at == target, x, 0.0), axis=0)
        tl.store(right + row, found, mask=(target >= part * C) & (target < tl.minimum(part * C + C, cols)))

    @triton.jit
    def _add_parts(each, lse, parts, C: tl.constexpr):
        row, at = tl.program_id(0), tl.arange(0, C)
        x = tl.load(each + row * parts + at, mask=at < parts, other=float("-inf"))
        before = tl.load(lse + row)
        most = tl.maximum(tl.max(x, axis=0), before)
        tl.store(lse + row, most + tl.log(tl.sum(tl.exp(x - most), axis=0) + tl.exp(before - most)))

    @triton.jit(do_not_specialize=["start"])
    def _softmax_grad(logits, targets, lse, scale, start, cols, C: tl.constexpr):
        row, at = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
        place = logits + row.to(tl.int64) * cols + at
        x = tl.load(place, mask=at < cols, other=float("-inf")).to(tl.float32)
        target = (tl.load(targets + row) - start).to(tl.int32)
        p = (tl.exp(x - tl.load(lse + row)) - (at == target).to(tl.float32)) * tl.load(scale + row)
        tl.store(place, p.to(logits.dtype.element_ty), mask=at < cols)

    @triton.jit(do_not_specialize=["start", "count"])
    def _take_rows(kept, names, grad, start, count, width, H: tl.constexpr):
        slot, column = tl.program_id(0), tl.arange(0, H)
        at = tl.load(names + slot) - start
        if (at >= 0) & (at < count):
            row = tl.load(grad + at.to(tl.int64) * width + column, mask=column < width)
            tl.store(kept + slot.to(tl.int64) * width + column, row, mask=column < width)

    @triton.jit(do_not_specialize=["start", "count", "n"])
    def _add_rows(grad, ids, order, rows, start, count, n, width, H: tl.constexpr):
        first, column = tl.program_id(0), tl.arange(0, H)
        name = tl.load(ids + first)
        before = tl.load(ids + first - 1, mask=first > 0, other=-1)
        at = name - start
        if (before != name) & (at >= 0) & (at < count):
            total = tl.load(grad + at * width + column, mask=column < width, other=0.0).to(tl.float32)
            place = first
            while (place < n) & (tl.load(ids + place, mask=place < n, other=-1) == name):
                row = tl.load(order + place)
                total += tl.load(rows + row * width + column, mask=column < width, other=0.0).to(tl.float32)
                place += 1
            tl.store(grad + at * width + column, total.to(grad.dtype.element_ty), mask=column < width)
