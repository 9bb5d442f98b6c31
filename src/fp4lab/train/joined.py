"""`ChunkedAdamW` with one state for all parameters of a width, not one for each (`step.join`).

Rows know nothing of each other, so the rows of many matrices can be one matrix: the same numbers from a fifth of the kernels,
which is what a small model on a GPU waits for. The price is a second copy of the packed weights and, for a moment, of the
gradients. With rounding to nearest the result is that of `ChunkedAdamW` bit for bit; stochastic rounding, of weights or of
two-level moments, is keyed by matrix and row, so its dither is another, as good, one.

Linears are joined by width and kind of scales; they need no float parameter besides (`ParameterState` without an image), and
the parameter's own value, which nothing reads, is left as it is. Norms are joined by width, as fp32.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fp4lab.events import StateHealth
from fp4lab.model.paths import valueless
from fp4lab.nvfp4 import PackedTensor
from fp4lab.train.adamw import AdamWOptions, ParameterState, count_blocks, update_rows
from fp4lab.train.health import Health
from fp4lab.train.state import named_parts

NORMS = "norms"


@dataclasses.dataclass
class Group:
    """Parameters whose rows are one state's, in order. `rows` [start, stop) of each."""

    names: list[str]
    rows: list[tuple[int, int]]
    state: ParameterState


class JoinedAdamW:
    """The interface of ChunkedAdamW. Every 2-D parameter but the embedding must have its packed image in `packed`.

    Raises ValueError for one that has not, and for a second-level scale per tensor, which rows of many would have to share.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        packed: dict[str, PackedTensor],
        options: AdamWOptions,
        after_each: Callable[[int, int], None] | None = None,
    ):
        self.options, self.after_each, self.t = options, after_each, 0
        self._parameters = parameters
        alike: dict[tuple, list[str]] = {}
        for name, p in parameters.items():
            alike.setdefault(self._kind(name, p, packed.get(name)), []).append(name)
        self.groups = [self._group(i, names, packed) for i, names in enumerate(alike.values())]

    def _kind(self, name: str, p: Tensor, image: PackedTensor | None) -> tuple:
        if p.ndim == 1:
            return NORMS, p.shape[0]
        if any(part in name for part in self.options.keep_high_precision):
            return name, p.shape[1]
        if image is None or image.levels == "tensor":
            why = "has no packed image" if image is None else "has one second-level scale for the whole tensor"
            raise ValueError(f"{name} {why}: its rows cannot be joined with others")
        return image.levels, image.divide, p.shape[1]

    def _group(self, index: int, names: list[str], packed: dict[str, PackedTensor]) -> Group:
        parts = [self._parameters[n].detach() for n in names]
        sizes = [1 if p.ndim == 1 else p.shape[0] for p in parts]
        stops = torch.tensor(sizes).cumsum(0).tolist()
        rows = [(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
        images = [packed[n] for n in names if n in packed]
        if not images:  # norms, or the embedding
            whole = torch.cat([p.reshape(-1, p.shape[-1]) for p in parts]).float()
            options = dataclasses.replace(self.options, keep_high_precision=("",))
            return Group(names, rows, ParameterState(index, names[0], whole, None, options))
        first = images[0]
        joint = PackedTensor(
            torch.cat([p.codes for p in images]),
            torch.cat([p.block_scale.view(torch.uint8) for p in images]).view(torch.float8_e4m3fn),
            None if first.global_scale is None else torch.cat([p.global_scale for p in images if p.global_scale is not None]),
            (stops[-1], first.shape[1]),
            first.divide,
        )
        start = None if any(map(valueless, parts)) else torch.cat(parts)
        return Group(names, rows, ParameterState(index, names[0], None, joint, self.options, start))

    def names(self) -> list[str]:
        return list(self._parameters)

    def stored(self) -> dict[str, PackedTensor]:
        """The packed weights, as they would be exported."""
        found = ((n, g.state.stored, span) for g in self.groups for n, span in zip(g.names, g.rows, strict=True))
        return {n: whole.rows(*span) for n, whole, span in found if whole is not None}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for g in self.groups:
            yield from g.state.tensors()
            if g.state.image is not None:
                yield "state_w_data", g.state.image
            if g.state.codes is not None:  # a copy: the rows of several parameters
                yield from ((f"joined_{part}", t) for part, t in named_parts(g.state.codes))

    @torch.no_grad()
    def step(self, lr: float) -> StateHealth:
        """One update of every parameter; all must have a gradient."""
        self.t += 1
        health = Health()
        for done, g in enumerate(self.groups, start=1):
            grads = [self._parameters[n].grad for n in g.names]
            joint = torch.cat([grad.reshape(-1, g.state.cols) for grad in grads if grad is not None])
            if len(joint) != g.state.rows:
                raise ValueError(f"of {', '.join(g.names)} some have no gradient")
            update_rows(g.state, joint, 0, self.t, lr, health)
            count_blocks(g.state, health)
            for name in g.names:
                self._parameters[name].grad = None
            if g.state.image is not None:
                values: list[Tensor] = [self._parameters[n] for n in g.names]
                parts = g.state.image.split([stop - start for start, stop in g.rows])
                torch._foreach_copy_(values, [x.view_as(p) for x, p in zip(parts, values, strict=True)])
            if self.after_each is not None:
                self.after_each(done, len(self.groups))
        return health.event(self.t)
