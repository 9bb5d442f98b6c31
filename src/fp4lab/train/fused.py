"""AdamW inside the backward pass: each weight gradient is used the moment it exists and never kept (`step=fused`).

The arithmetic is that of `adamw` (reference section 5.4) and the stored state the same; what differs is when. A linear's
backward hands its gradient over (`model.linears.ConsumingLinear`), its rows are updated, the gradient is gone. The forward
reads packed weights whatever the master is; a float one lies with the moments. The head and its cross-entropy go by chunks of
the vocabulary (`head`). With a tied head the embedding has two gradients, one from the head and one, of the rows that were
looked up, from the lookup, which is last of all. Where kernels can update some rows and not others, only these rows wait for
it; elsewhere the head's is computed again then, chunk by chunk.

What cannot be had: clipping by the global norm, which is known only when all gradients are gone. `max_update` bounds every
element's update instead; the norm itself is summed up on the way and reported.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fp4lab.events import StateHealth
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.model.linears import ConsumingEmbedding, ConsumingLinear
from fp4lab.model.qwen3 import Qwen3
from fp4lab.nvfp4 import PackedTensor, adamw_product
from fp4lab.train import head_kernel
from fp4lab.train.adamw import AdamWOptions, ParameterState, count_blocks, update_rows
from fp4lab.train.batches import IGNORE
from fp4lab.train.beside import Beside
from fp4lab.train.head import ChunkedCrossEntropy, Head, TiedRows, chunks, room
from fp4lab.train.health import Health
from fp4lab.train.kernel_step import Joint, KernelStep
from fp4lab.train.vectors import Vectors


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
        self._model, self._embedding = model, model.model.embed_tokens
        self._waiting: TiedRows | None = None  # this step's
        self._later: Head | None = None  # whose gradient the embedding takes, with its own
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
        if self.tied and self._head_learns and (why := self._why_all_wait()) is not None:
            text += f"; all rows of the head wait for the embedding's gradient ({why})"
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
        self._embedding.looked.clear()
        self._waiting = None
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

    def _consume_some(self, grad: Tensor, names: Tensor) -> None:
        """Updates those rows of the embedding that `names` has, of a kernel's kind."""
        assert self.fast is not None
        self.fast.update_some(self.states[EMBEDDING], grad, names)
        self._note(EMBEDDING)

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
        share, flat = counts.reshape(-1).float() / counts.sum(), hidden.reshape(-1, hidden.shape[-1])
        head = Head(self.head, flat.detach(), targets.reshape(-1), self.options.kernels and head_kernel.take(flat))
        if flat.requires_grad:
            head.room = room(self._model.config, len(flat), flat.itemsize, self._model.recompute)
        return ChunkedCrossEntropy.apply(flat, share, head, self)

    @torch.no_grad()
    def take_head_rows(self, head: Head, start: int, dlogits: Tensor) -> None:
        """The backward of the loss. Updates the head's rows from `start` on that nothing else has a gradient for."""
        if not self._head_learns:
            return
        if self._head_is_few(head):
            head.parts.append(dlogits)
            return
        waiting = self._rows_that_wait(head)
        if self.tied and waiting is None:
            return

        def work(start: int, dlogits: Tensor) -> None:
            grad = dlogits.T @ head.hidden
            if waiting is None:
                self.consume(HEAD, grad, start)
            else:
                waiting.take(grad, start)
                self._consume_some(grad, waiting.others[start : start + len(grad)])

        beside = self.fast is not None and (EMBEDDING if self.tied else HEAD) in self._taken
        for a, b in chunks(dlogits.shape[1]):
            part = dlogits[:, a:b]
            if beside:
                self.beside.run(functools.partial(work, start + a, part), part, head.hidden)
            else:
                work(start + a, part)

    def _head_is_few(self, head: Head) -> bool:
        """Whether the update makes the gradient of these positions, and of the tokens looked up, itself."""
        looked = self._embedding.looked if self.tied else []
        if self.tied and len(looked) != 1:
            return False
        state = self.states[EMBEDDING if self.tied else HEAD]
        return self._is_few(state, head.hidden.dtype, len(head.hidden) + sum(t.numel() for t in looked))

    def _rows_that_wait(self, head: Head) -> TiedRows | None:
        """Those of a tied head that this step looked up, where the others need not wait with them."""
        looked = self._embedding.looked
        if self._waiting is None and self.tied and len(looked) == 1 and self._why_all_wait() is None:
            self._waiting = TiedRows(looked[0].reshape(-1), self.states[EMBEDDING].rows, head.hidden)
        return self._waiting

    def _why_all_wait(self) -> str | None:
        """Why all rows of a tied head wait for the lookup's gradient, with theirs computed again then."""
        if self.fast is None or EMBEDDING not in self._taken:
            return "plain torch updates them"
        if self.dtype != torch.bfloat16:
            return f"the computation is in {self.dtype}"
        return self.fast.why_not_some(self.states[EMBEDDING])

    def take_head(self, head: Head) -> None:
        """After all rows: few positions have their product now, and what must be computed again is kept."""
        if not self._head_learns or self._waiting is not None:
            return
        head.whole = torch.cat(head.parts, dim=1) if head.parts else None
        head.parts.clear()
        if self.tied:
            self._later = head
        elif head.whole is not None:
            self.consume_product((HEAD,), head.whole, head.hidden)

    @torch.no_grad()
    def _consume_lookup(self, ids: Tensor, rows: Tensor) -> None:
        state = self.states[EMBEDDING]
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self.beside.join()  # rows of all chunks are there
            waiting.add(rows)
            self._consume_some(waiting.grad, waiting.names)
            return
        head, self._later = self._later, None
        if head is not None and head.whole is not None:
            # a token more for each: its row's gradient times 1 in the row that was looked up
            own = (ids.unsqueeze(1) == torch.arange(state.rows, device=ids.device)).to(rows.dtype)
            self.consume_product((EMBEDDING,), torch.cat([head.whole, own]), torch.cat([head.hidden, rows]))
            return
        fast = self.fast is not None and head_kernel.take(rows)
        ordered, order = ids.sort(stable=True) if fast else (ids, ids)
        for start, stop in chunks(state.rows):
            grad = rows.new_zeros(stop - start, state.cols) if head is None else head.grad(start, stop)
            if fast:
                head_kernel.add_rows_(grad, start, ordered, order, rows)
            else:
                here = (ids >= start) & (ids < stop)
                grad.index_add_(0, (ids - start).clamp_(0, stop - start - 1), rows * here.unsqueeze(1))
            self.consume(EMBEDDING, grad, start)
