"""AdamW inside the backward pass: each weight gradient is used the moment it exists and never kept (`step=fused`).

The arithmetic is that of `adamw` (reference section 5.4) and the stored state the same; what differs is when. A linear's
backward hands its gradient over (`model.linears.ConsumingLinear`), its rows are updated, the gradient is gone. The forward
reads packed weights whatever the master is; a float one lies with the moments. The head and its cross-entropy go by chunks of
the vocabulary, forward and backward, so that neither [tokens, vocab] nor the head's gradient exists as a whole. With a tied
head the embedding has two gradients, one from the head and one from the lookup; the head's is computed again, chunk by chunk,
when the lookup's comes, which is last of all.

What cannot be had: clipping by the global norm, which is known only when all gradients are gone. `max_update` bounds every
element's update instead; the norm itself is summed up on the way and reported.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4lab.events import StateHealth
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.model.linears import ConsumingEmbedding, ConsumingLinear
from fp4lab.model.qwen3 import Qwen3
from fp4lab.nvfp4 import PackedTensor, unpack
from fp4lab.train.adamw import AdamWOptions, ParameterState, count_blocks, update_rows
from fp4lab.train.batches import IGNORE
from fp4lab.train.health import Health

VOCABULARY_CHUNK = 8192  # rows of the head that are dequantised at a time


class FusedAdamW:
    """`begin(lr)`, then a backward of `loss`, which updates, then `finish()`.

    `packed` gives the stored NVFP4 image of every linear by name, and is written in place. Raises ValueError for a model that
    was not built of consuming modules. `dense` are the weights before they were packed, where there are any: what float masters
    and residuals start from. They are taken out of it.
    """

    def __init__(
        self,
        model: Qwen3,
        packed: dict[str, PackedTensor],
        tied: bool,
        options: AdamWOptions,
        after_each: Callable[[int, int], None] | None = None,
        dense: dict[str, Tensor] | None = None,
    ):
        dense = dense or {}
        self.options, self.t, self.after_each = options, 0, after_each
        if not isinstance(model.model.embed_tokens, ConsumingEmbedding):
            raise ValueError("the model keeps gradients: build it with step=fused")
        self._norms = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.head, self.tied = packed[HEAD], tied
        self._later: list[Head] = []  # heads whose gradient the embedding takes
        trained: dict[str, tuple[Tensor | None, PackedTensor | None]] = {}
        for module_name, module in model.named_modules():  # the order of step=chunked, whose dither goes by it
            name = f"{module_name}.weight"
            if name in self._norms:
                trained[name] = self._norms[name], None
            elif isinstance(module, ConsumingEmbedding):
                kept = module.weight
                trained[name] = (None, kept) if isinstance(kept, PackedTensor) else (kept, None)
                module.consume = self._consume_lookup
            elif isinstance(module, ConsumingLinear) and not (name == HEAD and tied):
                trained[name] = None, packed[name]
                if name != HEAD:
                    module.consume = functools.partial(self.consume, name)
        self.states = {
            n: ParameterState(i, n, *parts, options, dense.pop(n, None)) for i, (n, parts) in enumerate(trained.items())
        }

    def names(self) -> list[str]:
        return list(self.states)

    def stored(self) -> dict[str, PackedTensor]:
        """The packed weights, as they would be exported."""
        return {n: s.stored for n, s in self.states.items() if s.stored is not None}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for s in self.states.values():
            yield from s.tensors()

    def begin(self, lr: float) -> None:
        """Everything that a backward hands over from now on is one step."""
        self.t += 1
        self._lr, self._health, self._seen = lr, Health(), set[str]()
        self._squares = torch.zeros((), dtype=torch.float64, device=self.head.device)

    @torch.no_grad()
    def consume(self, name: str, grad: Tensor, first: int = 0) -> None:
        """Updates the rows of one parameter from `first` on with their gradient [rows, cols]."""
        self._squares += grad.float().square().sum()
        update_rows(self.states[name], grad, first, self.t, self._lr, self._health)
        if name not in self._seen:
            self._seen.add(name)
            if self.after_each is not None:
                self.after_each(len(self._seen), len(self.states))

    @torch.no_grad()
    def finish(self) -> tuple[StateHealth, Tensor]:
        """The norms' update; then what the step did, and the global gradient norm."""
        for name, p in self._norms.items():
            if p.grad is not None:
                self.consume(name, p.grad.reshape(self.states[name].rows, -1))
                p.grad = None
        for name in self._seen:
            count_blocks(self.states[name], self._health)
        return self._health.event(self.t), self._squares.sqrt()

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the targets that count; hidden [B, T, H] after the final norm, targets [B, T]."""
        counts = targets != IGNORE
        return _ChunkedCrossEntropy.apply(hidden[counts], targets[counts], self)

    def take_head(self, head: "Head") -> None:
        """The backward of the loss: an untied head is updated now, a tied one with the lookup."""
        if self.tied:
            self._later.append(head)
            return
        for start, stop in head.pieces():
            self.consume(HEAD, head.grad(start, stop), start)

    @torch.no_grad()
    def _consume_lookup(self, ids: Tensor, rows: Tensor) -> None:
        state = self.states[EMBEDDING]
        heads, self._later = self._later, []
        for start in range(0, state.rows, VOCABULARY_CHUNK):
            stop = min(start + VOCABULARY_CHUNK, state.rows)
            grad = torch.zeros(stop - start, state.cols, dtype=rows.dtype, device=rows.device)
            for head in heads:
                grad += head.grad(start, stop)
            here = (ids >= start) & (ids < stop)
            self.consume(EMBEDDING, grad.index_add_(0, ids[here] - start, rows[here]), start)


@dataclass
class Head:
    """What the gradient of the head's rows is made of: (softmax - one-hot)^T hidden, scaled.

    hidden [N, H], targets [N], lse [N] fp32 (log of the sum of exponentials), scale [] fp32.
    """

    weight: PackedTensor
    hidden: Tensor
    targets: Tensor
    lse: Tensor
    scale: Tensor

    def pieces(self) -> Iterator[tuple[int, int]]:
        rows = self.weight.shape[0]
        for start in range(0, rows, VOCABULARY_CHUNK):
            yield start, min(start + VOCABULARY_CHUNK, rows)

    def logit_grad(self, start: int, stop: int, weight: Tensor) -> Tensor:
        """Gradient of the logits of rows start..stop, [N, stop - start] in the compute dtype."""
        p = ((self.hidden @ weight.T).float() - self.lse.unsqueeze(1)).exp_()
        here = (self.targets >= start) & (self.targets < stop)
        p[here.nonzero().squeeze(1), self.targets[here] - start] -= 1
        return p.mul_(self.scale).to(self.hidden.dtype)

    def grad(self, start: int, stop: int) -> Tensor:
        """Gradient of the rows start..stop of the head, [stop - start, H]."""
        weight = unpack(self.weight.rows(start, stop), self.hidden.dtype)
        return self.logit_grad(start, stop, weight).T @ self.hidden


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, optimizer: FusedAdamW) -> Tensor:
        """Two passes over the vocabulary in all: here for the sum of exponentials, in the backward for the gradients."""
        head = Head(optimizer.head, hidden.detach(), targets, *hidden.new_zeros(2, dtype=torch.float32))
        lse = torch.full((len(targets),), -torch.inf, device=hidden.device)
        right = torch.zeros_like(lse)
        for start, stop in head.pieces():
            logits = (head.hidden @ unpack(head.weight.rows(start, stop), hidden.dtype).T).float()
            lse = torch.logaddexp(lse, logits.logsumexp(1))
            here = ((targets >= start) & (targets < stop)).nonzero().squeeze(1)
            right[here] = logits[here, targets[here] - start]
        head.lse = lse
        ctx.head, ctx.optimizer = head, optimizer
        return (lse - right).mean()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        head: Head = ctx.head
        head.scale = dloss / len(head.targets)
        dx = torch.zeros_like(head.hidden, dtype=torch.float32)
        for start, stop in head.pieces():
            weight = unpack(head.weight.rows(start, stop), head.hidden.dtype)
            dx += (head.logit_grad(start, stop, weight) @ weight).float()
        ctx.optimizer.take_head(head)
        return dx.to(head.hidden.dtype), None, None
