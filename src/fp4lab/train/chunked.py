"""`step=chunked`: a backward that keeps every gradient, then packed AdamW parameter by parameter, chunk by chunk.

`adamw.update_rows` does it, in plain torch: the reference of every other step. With `kernels` a chunk is one launch of
`kernel_step` where that has a kernel, and state that lies on the host visits the GPU chunk by chunk, packed.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fp4lab.events import StateHealth
from fp4lab.model.paths import valueless
from fp4lab.nvfp4 import PackedTensor
from fp4lab.train.adamw import MASTERS, AdamWOptions, ParameterState, count_blocks, update_rows
from fp4lab.train.health import Health
from fp4lab.train.kernel_step import KernelStep


class ChunkedAdamW:
    """`step()` reads `.grad` of the parameters and updates them and their stored state in place.

    `packed` gives the stored NVFP4 image of the linears, by name; a weight that is not there is kept as a float, whatever
    `master` says. It is written in place. Raises ValueError for an unknown master or state and for chunk_rows < 1.
    `after_each(done, total)` is called after each parameter.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        packed: dict[str, PackedTensor],
        options: AdamWOptions,
        after_each: Callable[[int, int], None] | None = None,
    ):
        if options.master not in MASTERS:
            raise ValueError(f"master {options.master!r}: expected one of {', '.join(MASTERS)}")
        if options.chunk_rows < 1:
            raise ValueError(f"chunk_rows {options.chunk_rows}: expected at least 1")
        self.options, self.after_each, self.t = options, after_each, 0
        self._parameters = parameters
        self.states = [
            ParameterState(i, name, None if valueless(p) else p, packed.get(name), options)
            for i, (name, p) in enumerate(parameters.items())
        ]
        self.fast = KernelStep(options, self.states[0].device) if options.kernels and self.states else None

    def describe(self) -> str:
        """Which path updates what, for the records."""
        if self.fast is None:
            return "updates are plain torch operations: step.kernels=false"
        left = {s.name: why for s in self.states if (why := self.fast.why_not(s)) is not None}
        if len(left) == len(self.states):
            return f"updates are plain torch operations: {next(iter(left.values()))}"
        reasons = {why: sum(w == why for w in left.values()) for why in left.values()}
        rest = "".join(f"; {n} by plain torch, {why}" for why, n in reasons.items())
        return f"one Triton kernel updates each chunk of {len(self.states) - len(left)} matrices{rest}"

    def names(self) -> list[str]:
        return [s.name for s in self.states]

    def stored(self) -> dict[str, PackedTensor]:
        """The packed weights, as they would be exported."""
        return {s.name: s.stored for s in self.states if s.stored is not None}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for s in self.states:
            yield from s.tensors()

    @torch.no_grad()
    def step(self, lr: float) -> StateHealth:
        """One update of every parameter that has a gradient. Bias correction counts steps of the optimizer."""
        self.t += 1
        health = Health()
        if self.fast is not None:
            self.fast.set(self.t, lr)
            self.fast.counts.zero_()
        grads = {s.name: self._parameters[s.name].grad for s in self.states}
        if self.options.offload_grad:  # all of them first: backward's memory is free before the step allocates
            for s in self.states:
                self._parameters[s.name].grad, grad = None, grads[s.name]
                grads[s.name] = None if grad is None else grad.to("cpu")
        for done, s in enumerate(self.states, start=1):
            grad = grads.pop(s.name)
            if grad is not None:
                self._update(s, grad.reshape(s.rows, s.cols), lr, health)
                self._parameters[s.name].grad = grad = None  # gone before `after_each` returns memory
            if self.after_each is not None:
                self.after_each(done, len(self.states))
        if self.fast is not None:
            health.kernel(self.fast.counts, self.options.state.startswith("nvfp4"))
        return health.event(self.t)

    def _update(self, s: ParameterState, grad: Tensor, lr: float, health: Health) -> None:
        if self.fast is None or self.fast.why_not(s) is not None:
            update_rows(s, grad, 0, self.t, lr, health)
            count_blocks(s, health)
            return
        for start in range(0, s.rows, self.options.chunk_rows):
            self.fast.update(s, grad[start : start + self.options.chunk_rows].to(s.device), start)
