"""Packed AdamW, row chunk by row chunk (reference section 5.4).

For rows start..stop of each parameter: w, m, v are decoded to fp32; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
update = (m / bias1) / (sqrt(v / bias2) + eps); w = w - lr (update + decay w); all three are stored again. Scratch is a few
fp32 copies of `chunk_rows` rows, whatever the model. Rows are independent of each other, and the dither of stochastic
rounding depends on the element's place alone, so the result does not depend on `chunk_rows`, bit for bit.

The weight between steps (`master`):
  fp32, bf16         the float parameter itself, in the dtype that its owner gave it
  packed             NVFP4, nearest: the reference's. Updates smaller than half a code's distance vanish.
  packed_stochastic  NVFP4, stochastic: small updates survive on average; no float master exists.
A packed weight starts each step from its stored codes; the float parameter is only their image. A weight whose second-level
scale is per tensor keeps that scale: one chunk cannot know the tensor's maximum.

1-D parameters (norms) and the embedding have fp32 moments and an fp32 master whatever the options say, of their own where
the parameter is narrower (in bf16 a norm near 1 loses every step below 2e-3); `pack_everything` packs them as the reference
does (its failure 41). A gradient that is not finite makes NaN weights, whatever the master: never a finite wrong one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp4lab.events import StateHealth
from fp4lab.nvfp4 import BLOCK, PackedTensor, pack, unpack, update_stochastic
from fp4lab.nvfp4.packed import matrix_shape
from fp4lab.train.health import Health
from fp4lab.train.noise import dither, key
from fp4lab.train.state import Moment, named_parts, write_rows

MASTERS = ("packed", "packed_stochastic", "bf16", "fp32")


@dataclass(frozen=True)
class AdamWOptions:
    """See `conf/step/chunked.yaml` and config.StepConfig for what each means."""

    chunk_rows: int = 32
    state: str = "nvfp4_two_level"
    master: str = "packed_stochastic"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_update: float | None = None
    offload_mv: bool = False
    offload_w: bool = False
    offload_grad: bool = False
    pack_everything: bool = False
    rule: str = "torchao"  # of packed weights, nearest
    seed: int = 0
    kernels: bool = True  # step=fused on a GPU: Triton where it has a kernel; else plain torch
    keep_high_precision: tuple[str, ...] = ("embed_tokens",)  # parts of names; 1-D parameters always


class ParameterState:
    """One parameter's weight and moments as matrices [rows, cols]."""

    def __init__(self, index: int, name: str, image: Tensor | None, packed: PackedTensor | None, options: AdamWOptions):
        """`image` is the float parameter; None where the packed weight is all there is."""
        self.index, self.name, self.image, self.options = index, name, image, options
        shape, device = (packed.shape, packed.device) if image is None and packed else (image.shape, image.device)  # type: ignore[union-attr]
        self.rows, self.cols = matrix_shape(tuple(shape))
        self.device = device
        kept = image is not None and (len(shape) == 1 or any(part in name for part in options.keep_high_precision))
        self.high_precision = kept and not options.pack_everything
        self.packed: PackedTensor | None = None
        self.master: Tensor | None = None
        if self.high_precision:
            assert image is not None
            if image.dtype != torch.float32:
                self.master = image.detach().reshape(self.rows, self.cols).float()
        elif options.master.startswith("packed") and (packed is not None or options.pack_everything):
            start = packed if packed is not None else pack(image, "nearest")  # type: ignore[arg-type]
            self.packed = start.to("cpu") if options.offload_w else start
        state = "fp32" if self.high_precision else options.state
        self.mv_device = torch.device("cpu") if options.offload_mv else device
        self.m = Moment(self.rows, self.cols, state, False, self.mv_device, options.beta1)
        self.v = Moment(self.rows, self.cols, state, True, self.mv_device, options.beta2)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of the stored weight, fp32, on the parameter's device."""
        if self.packed is not None:
            return unpack(self.packed.rows(start, stop)).to(self.device)
        return self.float_rows(start, stop).to(torch.float32, copy=True)  # a copy: `write` overwrites these rows

    def matrix(self) -> Tensor:
        assert self.image is not None
        return self.image.detach().view(self.rows, self.cols)

    def float_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the float master, in place."""
        return (self.matrix() if self.master is None else self.master)[start:stop]

    def write(self, start: int, stop: int, value: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Stores fp32 rows; returns what is now stored (fp32) and, of packed ones, whose block scale changed (bool)."""
        if self.packed is None:
            rows = self.float_rows(start, stop)
            new = value.to(rows.dtype)
            rows.copy_(new)
            if self.master is not None:
                self.matrix()[start:stop] = new.to(self.matrix().dtype)
            return new.float(), None
        old = self.packed.rows(start, stop)
        new_packed = self._pack(value.to(self.packed.device), old, start, stop, step)
        rescaled = old.block_scale.view(torch.uint8) != new_packed.block_scale.view(torch.uint8)
        rescaled = rescaled.repeat_interleave(BLOCK, dim=1)[:, : self.cols].to(self.device)
        write_rows(self.packed, start, stop, new_packed)
        stored = unpack(new_packed).to(self.device)
        if self.image is not None:
            self.matrix()[start:stop] = stored.to(self.image.dtype)
        return stored, rescaled

    def _pack(self, value: Tensor, old: PackedTensor, start: int, stop: int, step: int) -> PackedTensor:
        kept = old.global_scale if old.levels == "tensor" else None
        if self.options.master == "packed":
            return pack(value, _nearest_rule(self.options.rule, old), old.levels, global_scale=kept)
        field = key(self.options.seed, step, self.index)
        noise, blocks = dither(field, start, stop, old.codes.shape[1] * 2, value.device)
        return update_stochastic(value, old, noise, blocks)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(kind, tensor) for the byte report, e.g. ("state_w_codes", ...)."""
        if self.packed is not None:
            yield from ((f"state_w_{part}", t) for part, t in named_parts(self.packed))
        if self.master is not None:
            yield "state_w_data", self.master
        for kind, moment in (("m", self.m), ("v", self.v)):
            yield from ((f"state_{kind}_{part}", t) for part, t in moment.tensors())


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
        self.states = [ParameterState(i, name, p, packed.get(name), options) for i, (name, p) in enumerate(parameters.items())]

    def names(self) -> list[str]:
        return [s.name for s in self.states]

    def stored(self) -> dict[str, PackedTensor]:
        """The packed weights, as they would be exported."""
        return {s.name: s.packed for s in self.states if s.packed is not None}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for s in self.states:
            yield from s.tensors()

    @torch.no_grad()
    def step(self, lr: float) -> StateHealth:
        """One update of every parameter that has a gradient. Bias correction counts steps of the optimizer."""
        self.t += 1
        health = Health()
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
        return health.event(self.t)

    def _update(self, s: ParameterState, grad: Tensor, lr: float, health: Health) -> None:
        update_rows(s, grad, 0, self.t, lr, health)
        count_blocks(s, health)


def update_rows(s: ParameterState, grad: Tensor, first: int, step: int, lr: float, health: Health) -> None:
    """One AdamW update of the rows from `first` on, by chunks; grad [rows, cols], which may lie on another device."""
    o = s.options
    bias1, bias2 = 1 - o.beta1**step, 1 - o.beta2**step
    for start in range(first, first + grad.shape[0], o.chunk_rows):
        stop = min(start + o.chunk_rows, first + grad.shape[0])
        g = grad[start - first : stop - first].to(s.device).float()
        w = s.read(start, stop)
        m = s.m.read(start, stop).to(s.device).lerp_(g, 1 - o.beta1)
        v = s.v.read(start, stop).to(s.device).mul_(o.beta2).addcmul_(g, g, value=1 - o.beta2)
        update = (m / bias1) / ((v / bias2).sqrt_().add_(o.eps))
        if o.max_update is not None:
            update.clamp_(-o.max_update, o.max_update)
        new = w * (1 - lr * o.weight_decay) - lr * update
        after, rescaled = s.write(start, stop, new, step)
        largest = g.abs().amax(dim=1, keepdim=True)
        s.m.write(start, stop, m.to(s.mv_device), largest)
        s.v.write(start, stop, v.to(s.mv_device), largest)
        health.update(update)
        if not s.high_precision:  # floats that always move would hide packed weights that never do
            health.weights(w, new, after, rescaled)


def count_blocks(s: ParameterState, health: Health) -> None:
    """Dead and saturated blocks of one parameter's state."""
    for kind, p in (("w", s.packed), ("m", s.m.packed), ("v", s.v.packed)):
        if p is not None:
            health.blocks(kind, p)


def _nearest_rule(rule: str, p: PackedTensor) -> str:
    """The rule to round to nearest with: the one asked for, where p's kind of scales has it."""
    if p.divide:
        return "ct"
    if rule in ("ct", "stochastic") or (rule == "native" and p.levels != "single"):
        return "nearest"
    return rule
