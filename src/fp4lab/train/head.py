"""The head and its cross-entropy by chunks of the vocabulary, for `fused`: its gradient never exists as a whole.

Two passes over the chunks: the forward's for the sum of exponentials, the backward's for the gradients. Both need the logits;
as many of the forward's are kept as there is room for, the others are computed again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fp4lab.model.config import Qwen3Config
from fp4lab.nvfp4 import PackedTensor, decode, matmul, matmul_back, product_kernel
from fp4lab.train import head_kernel

VOCABULARY_CHUNK = 8192  # rows of the head that are dequantised at a time


def chunks(rows: int, size: int = 0) -> Iterator[tuple[int, int]]:
    """[start, stop) of rows, `size` at a time, or VOCABULARY_CHUNK."""
    size = size or VOCABULARY_CHUNK
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def room(shape: Qwen3Config, n: int, size: int, recompute: str) -> int:
    """Bytes of n tokens' logits, of `size` each, that may wait for the backward: what that of a block takes when they are gone.
    It has its largest weight decoded, the gradient of it, and, where it computes all products again, these and theirs."""
    h, wide = shape.hidden_size, 2 * shape.intermediate_size
    products = shape.q_size + 2 * shape.kv_size + h + wide + h if recompute == "block" else 0
    return 2 * size * (wide * h + n * products)


@dataclass
class Head:
    """What the gradient of the head's rows is made of: (softmax - one-hot)^T hidden, scaled.

    hidden [N, H], targets [N]; fast: by kernels; room: bytes of logits that may be kept for the backward.
    """

    weight: PackedTensor
    hidden: Tensor
    targets: Tensor
    fast: bool
    room: int = 0
    lse: Tensor = field(init=False)  # [N] fp32, log of the sum of exponentials
    scale: Tensor = field(init=False)  # [N, 1] fp32, of the gradients: known in the backward
    parts: list[Tensor] = field(default_factory=list)  # `logit_grad` of few positions
    whole: Tensor | None = None  # and all of it
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lse = torch.full((len(self.targets),), -torch.inf, device=self.hidden.device)
        self.scale = torch.zeros_like(self.lse).unsqueeze(1)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) that are multiplied at a time: all of them where they are not decoded first."""
        rows = self.weight.shape[0]
        whole = product_kernel.why_not(self.weight, self.hidden.dtype, len(self.hidden)) is None
        return chunks(rows, rows if whole else 0)

    def add(self, start: int, stop: int, right: Tensor) -> None:
        """Takes the logits of rows start..stop into `lse`, and those of targets among them into right [N] fp32."""
        logits = matmul(self.hidden, self.weight.rows(start, stop))
        if logits.nbytes <= self.room:
            self._kept[start] = logits
            self.room -= logits.nbytes
        if self.fast:
            head_kernel.add_chunk(logits, self.targets, start, self.lse, right)
            return
        logits = logits.float()
        torch.logaddexp(self.lse, logits.logsumexp(1), out=self.lse)
        at, here = self._place(start, stop)
        right += (logits.gather(1, at) * here).squeeze(1)

    def logit_grad(self, start: int, stop: int, decoded: Tensor | None = None) -> Tensor:
        """Gradient of the logits of rows start..stop, [N, stop - start] in the compute dtype."""
        logits = self._kept.pop(start, None)
        if logits is None:
            logits = matmul(self.hidden, self.weight.rows(start, stop), decoded)
        if self.fast:
            return head_kernel.softmax_grad_(logits, self.targets, start, self.lse, self.scale)
        p = (logits.float() - self.lse.unsqueeze(1)).exp_()
        at, here = self._place(start, stop)
        p.scatter_add_(1, at, -here.float())
        return p.mul_(self.scale).to(self.hidden.dtype)

    def grad(self, start: int, stop: int) -> Tensor:
        """Gradient of the rows start..stop of the head, [stop - start, H]."""
        return self.logit_grad(start, stop).T @ self.hidden

    def _place(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Where in rows start..stop each target is [N, 1] int64, and whether it is there [N, 1]."""
        at = (self.targets - start).unsqueeze(1)
        return at.clamp(0, stop - start - 1), (at >= 0) & (at < stop - start)


class TiedRows:
    """Which rows of a tied head were looked up, and their gradients from the head, which wait for those of the lookup."""

    def __init__(self, ids: Tensor, rows: int, like: Tensor):
        """ids [N] of a table of `rows` rows; gradients are like `like` [.., H]."""
        self._ordered, self._order = ids.sort(stable=True)
        anew = torch.ones_like(self._ordered)
        anew[1:] = self._ordered[1:] != self._ordered[:-1]
        self._slot = anew.cumsum(0) - 1  # where each id's gradient waits
        self.names = torch.full_like(ids, -1, dtype=torch.int32).scatter_(0, self._slot, self._ordered.int())
        self.others = torch.arange(rows, dtype=torch.int32, device=ids.device).index_fill_(0, ids, -1)
        self.grad = like.new_empty(len(ids), like.shape[-1])

    def take(self, grad: Tensor, start: int) -> None:
        """Keeps those of grad [C, H] of the rows from `start` on."""
        head_kernel.take_rows_(self.grad, self.names, grad, start)

    def add(self, rows: Tensor) -> None:
        """The gradients of what was looked up [N, H], in the order of ids."""
        head_kernel.add_rows_(self.grad, 0, self._slot, self._order, rows)


class Learner(Protocol):
    def take_head_rows(self, head: Head, start: int, dlogits: Tensor) -> None:
        """`Head.logit_grad` of the rows from `start` on, which nobody reads any more."""

    def take_head(self, head: Head) -> None:
        """After all rows."""


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, share: Tensor, head: Head, learner: Learner) -> Tensor:
        """Sum of each position's cross-entropy [N] times its share [N]; `head.hidden` is hidden [N, H]."""
        right = torch.zeros_like(head.lse)
        for start, stop in head.pieces():
            head.add(start, stop, right)
        ctx.head, ctx.learner, ctx.share = head, learner, share
        return ((head.lse - right) * share).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None]:
        head: Head = ctx.head
        head.scale = (dloss * ctx.share).unsqueeze(1).contiguous()
        dx = torch.zeros_like(head.hidden, dtype=torch.float32)
        for start, stop in head.pieces():
            rows = head.weight.rows(start, stop)
            decoded = decode(head.hidden, rows)
            grad = head.logit_grad(start, stop, decoded)
            dx += matmul_back(grad, rows, decoded).float()
            ctx.learner.take_head_rows(head, start, grad)
        ctx.learner.take_head(head)
        return dx.to(head.hidden.dtype), None, None, None
