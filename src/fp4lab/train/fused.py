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
from fp4lab.nvfp4 import PackedTensor, adamw_product, matmul, matmul_back, product_kernel
from fp4lab.train import head_kernel
from fp4lab.train.adamw import AdamWOptions, ParameterState, count_blocks, update_rows
from fp4lab.train.batches import IGNORE
from fp4lab.train.beside import Beside
from fp4lab.train.health import Health
from fp4lab.train.kernel_step import Joint, KernelStep
from fp4lab.train.vectors import Vectors

VOCABULARY_CHUNK = 8192  # rows of the head that are dequantised at a time


class FusedAdamW:
    """`begin(lr)`, then a backward of `loss`, which updates, then `finish()`.

    `packed` gives the stored NVFP4 image of every linear by name, and is written in place. Raises ValueError for a model that
    was not built of consuming modules. `dense` are the weights before they were packed, where there are any: what float masters
    and residuals start from. They are taken out of it. `frozen` names what does not learn.
    """

    def __init__(
        self,
        model: Qwen3,
        packed: dict[str, PackedTensor],
        tied: bool,
        options: AdamWOptions,
        after_each: Callable[[int, int], None] | None = None,
        dense: dict[str, Tensor] | None = None,
        frozen: frozenset[str] = frozenset(),
    ):
        dense = dense or {}
        self.options, self.t, self.after_each, self.dtype = options, 0, after_each, model.dtype
        if not isinstance(model.model.embed_tokens, ConsumingEmbedding):
            raise ValueError("the model keeps gradients: build it with step=fused")
        self.count = True  # whether the step that begins counts what becomes of the weights
        self.static = False  # every launch has the same shape whatever the batch holds: what a CUDA graph needs
        self._norms = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.head, self.tied = packed[HEAD], tied
        self._head_learns = (EMBEDDING if tied else HEAD) not in frozen
        self._squares = torch.zeros((), dtype=torch.float64, device=self.head.device)
        self.beside = Beside(self.head.device, options.streams)
        self._later: list[Head] = []  # heads whose gradient the embedding takes
        trained: dict[str, tuple[Tensor | None, PackedTensor | None]] = {}
        products: dict[tuple[str, ...], PackedTensor] = {}  # of linears: whose rows they have
        for module_name, module in model.named_modules():  # the order of step=chunked, whose dither goes by it
            name = f"{module_name}.weight"
            if name in frozen:
                module.frozen = True
            elif name in self._norms:
                trained[name] = self._norms[name], None
            elif isinstance(module, ConsumingEmbedding):
                kept = module.weight
                trained[name] = (None, kept) if isinstance(kept, PackedTensor) else (kept, None)
                module.consume = self._consume_lookup
            elif isinstance(module, ConsumingLinear) and not (name == HEAD and tied):
                names = module.members or (name,)
                module.frozen = all(n in frozen for n in names)
                if module.frozen:
                    continue
                assert not any(n in frozen for n in names), f"of {', '.join(names)} some learn and some do not"
                trained.update((n, (None, packed[n])) for n in names)
                if name != HEAD:
                    module.consume = functools.partial(self.consume_product, names)
                    products[names] = module.packed
        self.states = {
            n: ParameterState(i, n, *parts, options, dense.pop(n, None)) for i, (n, parts) in enumerate(trained.items())
        }
        self.fast = self._kernels(products) if options.kernels else None

    def _kernels(self, products: dict[tuple[str, ...], PackedTensor]) -> KernelStep | None:
        fast = KernelStep(self.options, self.head.device)
        taken = {n for n, s in self.states.items() if fast.why_not(s) is None}
        vectors = [s for s in self.states.values() if Vectors.takes(s)]
        if not taken:
            return None
        self._taken, self._vectors = taken, Vectors(vectors, self.options) if vectors else None
        self._joint = {
            n: Joint([self.states[x] for x in n], w) for n, w in products.items() if len(n) > 1 and taken.issuperset(n)
        }
        return fast

    def describe(self) -> str:
        """Which path updates what, for the records."""
        if self.fast is None:
            why = KernelStep(self.options, self.head.device).why_not(next(s for s in self.states.values() if s.stored))
            return f"updates are plain torch operations: {why if self.options.kernels else 'step.kernels=false'}"
        vectors = set() if self._vectors is None else {s.name for s in self._vectors.states}
        joined = sum(len(names) for names in self._joint)
        text = f"one Triton kernel updates each of {len(self._taken)} matrices"
        text += f", {joined} of them joined to {len(self._joint)}" if joined else ""
        alone = self._taken.difference(*self._joint)
        whole: list[Joint | ParameterState] = [*self._joint.values(), *(self.states[n] for n in alone)]
        reasons = [self.fast.why_not_product(x, self.dtype) for x in whole]
        text += f", and makes the gradient of up to {adamw_product.TOKENS} tokens for {reasons.count(None)} of {len(whole)}"
        text += "".join(f" (else: {why})" for why in sorted({r for r in reasons if r is not None}))
        text += f"; one sweep {len(vectors)} vectors"
        text += f"; {len(self.beside)} streams beside the backward's" if len(self.beside) else "; all on one stream"
        left = [n for n in self.states if n not in self._taken and n not in vectors]
        return text + "".join(f"; {n}: plain torch, {self.fast.why_not(self.states[n])}" for n in left)

    def all_kernels(self) -> bool:
        """Whether nothing is left to plain torch updates, which take their numbers from the host."""
        vectors = set() if self.fast is None or self._vectors is None else {s.name for s in self._vectors.states}
        return self.fast is not None and set(self.states) <= self._taken | vectors

    def names(self) -> list[str]:
        return list(self.states)

    def stored(self) -> dict[str, PackedTensor]:
        """The packed weights, as they would be exported."""
        return {n: s.stored for n, s in self.states.items() if s.stored is not None}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for s in self.states.values():
            yield from s.tensors()

    def begin(self, lr: float) -> None:
        """Everything that a backward hands over from now on is one step. Writes what launches read: outside a graph."""
        self.t += 1
        self._lr = lr
        if self.fast is not None:
            self.fast.set(self.t, lr)
        self.clear()

    def clear(self) -> None:
        """Zeroes what a step sums up: the first launches of a graph."""
        self._health, self._seen = Health(self.count), set[str]()
        self._squares.zero_()
        if self.fast is not None:
            self.fast.count = self.count
            self.fast.counts.zero_()

    @torch.no_grad()
    def consume(self, name: str, grad: Tensor, first: int = 0) -> None:
        """Updates the rows of one parameter from `first` on with their gradient [rows, cols]."""
        if self.fast is not None and name in self._taken:
            self.fast.update(self.states[name], grad, first)
        else:
            self._squares += grad.float().square().sum()
            update_rows(self.states[name], grad, first, self.t, self._lr, self._health)
        self._note(name)

    def _note(self, name: str) -> None:
        if name not in self._seen:
            self._seen.add(name)
            if self.after_each is not None:
                self.after_each(len(self._seen), len(self.states))

    @torch.no_grad()
    def consume_product(self, names: tuple[str, ...], dy: Tensor, x: Tensor) -> None:
        """The same of whole parameters, whose rows follow each other, with the gradient dy^T x; dy [N, rows], x [N, cols]."""
        if self.fast is not None and self._taken.issuperset(names):  # sums that plain torch adds up know one stream only
            self.beside.run(lambda: self._product(names, dy, x), dy, x)
        else:
            self._product(names, dy, x)

    def _product(self, names: tuple[str, ...], dy: Tensor, x: Tensor) -> None:
        if self.fast is not None and self._taken.issuperset(names):
            target = self._joint.get(names) or self.states[names[0]]
            if (names in self._joint or len(names) == 1) and self.fast.why_not_product(target, x.dtype, len(x)) is None:
                self.fast.update_product(target, dy, x)
                for name in names:
                    self._note(name)
                return
        grad = dy.T @ x
        if self.fast is not None and names in self._joint:
            self.fast.update_joint(self._joint[names], grad)
            for name in names:
                self._note(name)
            return
        for name, rows in zip(names, grad.split([self.states[n].rows for n in names]), strict=True):
            self.consume(name, rows)

    def _is_few(self, state: ParameterState, dtype: torch.dtype, n: int) -> bool:
        """Whether the gradient of n tokens need not be made for this parameter's update."""
        if self.fast is None or state.name not in self._taken:
            return False
        return self.fast.why_not_product(state, dtype, n) is None

    @torch.no_grad()
    def update_vectors(self) -> None:
        """The norms, whose gradients autograd keeps: the last launches of a step."""
        self.beside.join()
        done: set[str] = set()
        if self.fast is not None and self._vectors is not None:
            states = self._vectors.states
            grads = [self._norms[s.name].grad for s in states]
            assert all(g is not None for g in grads), "a norm without a gradient"
            squares, largest = self._vectors.update([g for g in grads if g is not None], self.fast.numbers)
            self._squares += squares
            self.fast.counts[0, 0] = torch.maximum(self.fast.counts[0, 0], largest)
            done = {s.name for s in states}
        for name, p in self._norms.items():
            if p.grad is not None and name not in done:
                self.consume(name, p.grad.reshape(self.states[name].rows, -1))
            p.grad = None

    @torch.no_grad()
    def finish(self) -> tuple[StateHealth, Tensor]:
        """The norms' update; then what the step did, and the global gradient norm."""
        self.update_vectors()
        return self.report()

    @torch.no_grad()
    def report(self) -> tuple[StateHealth, Tensor]:
        """What the step did, and the global gradient norm. Waits for the device."""
        squares = self._squares
        if self.fast is not None:
            self._health.kernel(self.fast.counts, self.options.state.startswith("nvfp4"))
            squares = squares + self.fast.counts[:, 1].sum(dtype=torch.float64)
        for name in self._seen:
            if self.fast is None or name not in self._taken:
                count_blocks(self.states[name], self._health)
        return self._health.event(self.t), squares.sqrt()

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the targets that count; hidden [B, T, H] after the final norm, targets [B, T]."""
        counts = targets != IGNORE
        if not self.static:  # positions that do not count cost nothing; how many they are, the host must know
            hidden, targets, counts = hidden[counts], targets[counts], counts[counts]
        share = counts.reshape(-1).float() / counts.sum()
        return _ChunkedCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), share, self)

    def takes_head_product(self, head: "Head") -> bool:
        """Whether the head is updated with `Head.whole` instead of with its gradient."""
        name = EMBEDDING if self.tied else HEAD
        return self._head_learns and self._is_few(self.states[name], head.hidden.dtype, len(head.hidden))

    def take_head(self, head: "Head") -> None:
        """The backward of the loss: an untied head is updated now, a tied one with the lookup."""
        if not self._head_learns:
            return
        if self.tied:
            self._later.append(head)
            return
        if head.whole is not None:
            self.consume_product((HEAD,), head.whole, head.hidden)
            return
        for start, stop in head.pieces():
            self.consume(HEAD, head.grad(start, stop), start)

    @torch.no_grad()
    def _consume_lookup(self, ids: Tensor, rows: Tensor) -> None:
        state = self.states[EMBEDDING]
        heads, self._later = self._later, []
        wholes = [head.whole for head in heads if head.whole is not None]
        if len(wholes) == len(heads) and self._is_few(state, rows.dtype, len(ids) + sum(map(len, wholes))):
            # a token more for each: its row's gradient times 1 in the row that was looked up
            own = (ids.unsqueeze(1) == torch.arange(state.rows, device=ids.device)).to(rows.dtype)
            dy, x = torch.cat([*wholes, own]), torch.cat([*(head.hidden for head in heads), rows])
            self.consume_product((EMBEDDING,), dy, x)
            return

        fast = self.fast is not None and head_kernel.take(rows)
        ordered, order = ids.sort(stable=True) if fast else (ids, ids)

        def piece(start: int, stop: int) -> None:
            grads = [head.grad(start, stop) for head in heads]
            grad = sum(grads[1:], grads[0]) if grads else rows.new_zeros(stop - start, state.cols)
            if fast:
                head_kernel.add_rows_(grad, start, ordered, order, rows)
            else:
                here = (ids >= start) & (ids < stop)
                grad.index_add_(0, (ids - start).clamp_(0, stop - start - 1), rows * here.unsqueeze(1))
            self.consume(EMBEDDING, grad, start)

        kept = [t for head in heads for t in (head.hidden, head.targets, head.lse, head.scale)]
        for start in range(0, state.rows, VOCABULARY_CHUNK):
            work = functools.partial(piece, start, min(start + VOCABULARY_CHUNK, state.rows))
            if self.fast is not None and EMBEDDING in self._taken:
                self.beside.run(work, ordered, order, rows, *kept)
            else:
                work()


@dataclass
class Head:
    """What the gradient of the head's rows is made of: (softmax - one-hot)^T hidden, scaled.

    hidden [N, H], targets [N], lse [N] fp32 (log of the sum of exponentials), scale [N, 1] fp32; fast: by kernels.
    """

    weight: PackedTensor
    hidden: Tensor
    targets: Tensor
    lse: Tensor
    scale: Tensor
    fast: bool
    whole: Tensor | None = None  # `logit_grad` of all rows, of few positions, once it was made

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) that are multiplied at a time: all of them where they are not decoded first."""
        rows = self.weight.shape[0]
        step = VOCABULARY_CHUNK if product_kernel.why_not(self.weight, self.hidden.dtype, len(self.hidden)) else rows
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def logits(self, start: int, stop: int) -> Tensor:
        """Of rows start..stop, [N, stop - start] in the compute dtype."""
        return matmul(self.hidden, self.weight.rows(start, stop))

    def add(self, start: int, stop: int, right: Tensor) -> None:
        """Takes the logits of rows start..stop into `lse`, and those of targets among them into right [N] fp32."""
        logits = self.logits(start, stop)
        if self.fast:
            head_kernel.add_chunk(logits, self.targets, start, self.lse, right)
            return
        logits = logits.float()
        torch.logaddexp(self.lse, logits.logsumexp(1), out=self.lse)
        at, here = self._place(start, stop)
        right += (logits.gather(1, at) * here).squeeze(1)

    def logit_grad(self, start: int, stop: int) -> Tensor:
        """Gradient of the logits of rows start..stop, [N, stop - start] in the compute dtype."""
        logits = self.logits(start, stop)
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


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, share: Tensor, optimizer: FusedAdamW) -> Tensor:
        """Two passes over the vocabulary in all: here for the sum of exponentials, in the backward for the gradients."""
        lse = torch.full((len(targets),), -torch.inf, device=hidden.device)
        right, fast = torch.zeros_like(lse), optimizer.options.kernels and head_kernel.take(hidden)
        head = Head(optimizer.head, hidden.detach(), targets, lse, torch.zeros_like(lse).unsqueeze(1), fast)
        for start, stop in head.pieces():
            head.add(start, stop, right)
        ctx.head, ctx.optimizer, ctx.share = head, optimizer, share
        return ((lse - right) * share).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None]:
        head: Head = ctx.head
        head.scale = (dloss * ctx.share).unsqueeze(1).contiguous()
        dx = torch.zeros_like(head.hidden, dtype=torch.float32)
        few, kept = ctx.optimizer.takes_head_product(head), list[Tensor]()
        for start, stop in head.pieces():
            grad = head.logit_grad(start, stop)
            dx += matmul_back(grad, head.weight.rows(start, stop)).float()
            if few:
                kept.append(grad)
        head.whole = torch.cat(kept, dim=1) if few else None
        ctx.optimizer.take_head(head)
        return dx.to(head.hidden.dtype), None, None, None
