"""`adamw.update_rows` as one kernel a matrix, for the states that it knows; the others stay with plain torch."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4lab.model.store import concat_rows
from fp4lab.nvfp4 import PackedTensor, adamw_kernel, adamw_product, kernels, unpack
from fp4lab.nvfp4.packed import BLOCK
from fp4lab.train.adamw import AdamWOptions, ParameterState
from fp4lab.train.noise import mix
from fp4lab.train.state import Moment, write_rows


@dataclass
class Joint:
    """Parameters whose rows are one matrix: `states` in order of its rows, w their packed weight, and their moments, of which
    theirs are made views here."""

    states: list[ParameterState]
    w: PackedTensor

    def __post_init__(self) -> None:
        stops = list(itertools.accumulate(s.rows for s in self.states))
        self.rows = list(itertools.pairwise([0, *stops]))
        self.borders = stops[0], stops[1] if len(stops) == 3 else adamw_kernel.NEVER
        self.m, self.v = (self._join([s.m for s in self.states]), self._join([s.v for s in self.states]))
        first = self.states[0].index
        self.index = first
        assert [s.index for s in self.states] == list(range(first, first + len(self.states))), "the dither goes by it"

    def _join(self, moments: list[Moment]) -> "PackedTensor | Tensor":
        packed = [x.packed for x in moments if x.packed is not None]
        if packed:
            whole = concat_rows(packed)
            for x, span in zip(moments, self.rows, strict=True):
                x.packed = whole.rows(*span)
            return whole
        data = torch.cat([x.data for x in moments if x.data is not None])
        for x, (start, stop) in zip(moments, self.rows, strict=True):
            x.data = data[start:stop]
        return data


class KernelStep:
    """One optimizer's kernel launches. What changes from step to step lies on the device, so a captured graph follows it."""

    def __init__(self, options: AdamWOptions, device: torch.device):
        self.options = options
        self.numbers = torch.zeros(adamw_kernel.NUMBERS, device=device)
        self.counts = torch.zeros(adamw_kernel.SPREAD, len(adamw_kernel.COUNTS), device=device)
        self.count = True  # whether this step's launches count what became of the weights
        self._constants = adamw_kernel.Constants(
            options.beta1,
            options.beta2,
            options.eps,
            options.weight_decay,
            options.max_update,
            options.master == "packed_stochastic",
            options.rule,
        )

    def why_not(self, s: ParameterState) -> str | None:
        """Why plain torch updates this parameter, or None."""
        o, w = self.options, s.packed
        if not kernels.available(s.device):
            return "the device is no GPU with Triton"
        if old := kernels.too_old(s.device, (8, 9), "E4M3 conversions"):
            return old
        if w is None or o.master not in ("packed", "packed_stochastic"):
            return f"step.master={o.master} has no kernel" if not s.high_precision else "it is kept in fp32"
        if w.levels == "row":
            return "its second-level scale is per row"
        if s.cols % BLOCK:
            return f"its {s.cols} columns are no multiple of {BLOCK}"
        if o.master == "packed" and o.rule not in adamw_kernel.RULES:
            return f"weights.rule={o.rule} has no kernel"
        if o.state not in adamw_kernel.FORMATS:
            return f"step.state={o.state} has no kernel"
        return None

    def set(self, step: int, lr: float) -> None:
        """Writes what this step's launches read. Outside a graph."""
        o = self.options
        numbers = torch.tensor([lr, 1 / (1 - o.beta1**step), 1 / (1 - o.beta2**step), 0.0])
        bits = mix(mix(o.seed) ^ step)
        numbers.view(torch.int32)[3] = bits - (1 << 32) if bits >> 31 else bits
        self.numbers.copy_(numbers)

    def update(self, s: ParameterState, grad: Tensor, first: int) -> None:
        """The rows from `first` on; grad [rows, cols]. State that lies on the host comes to the device for it, as it is."""
        stop = first + grad.shape[0]
        held = [_rows(x, first, stop) for x in (s.packed, s.m.packed or s.m.data, s.v.packed or s.v.data)]
        w, m, v = here = [x.to(s.device) for x in held]
        assert isinstance(w, PackedTensor)
        adamw_kernel.adamw(grad.contiguous(), w, m, v, self.numbers, self.counts, s.index, first, self._constants, self.count)
        for old, new in zip(held, here, strict=True):
            if old.device != s.device:
                _copy(old, new)
        if s.image is not None:
            s.matrix()[first:stop] = unpack(w, s.image.dtype)

    def update_joint(self, joint: Joint, grad: Tensor) -> None:
        """All rows of several parameters; grad [rows, cols]. The bits of `update` of each."""
        held = joint.w, joint.m, joint.v, self.numbers, self.counts
        adamw_kernel.adamw(grad, *held, joint.states[0].index, 0, self._constants, self.count, joint.borders)

    def why_not_some(self, target: "ParameterState | Joint") -> str | None:
        """Why `update_some` cannot be, of what `why_not` has no objection to, or None."""
        w, m, _ = _matrix(target)
        if w.device.type != "cuda" or m.device.type != "cuda":
            return "its state is on the host"
        return "it has a float image" if isinstance(target, ParameterState) and target.image is not None else None

    def update_some(self, s: ParameterState, grad: Tensor, names: Tensor) -> None:
        """Row i of grad [n, cols] is the gradient of the parameter's row names[i] (int32), and nobody's where that is negative.
        The bits of `update` of these rows."""
        w, m, v = _matrix(s)
        adamw_kernel.adamw(grad, w, m, v, self.numbers, self.counts, s.index, 0, self._constants, self.count, names=names)

    def why_not_product(self, target: "ParameterState | Joint", dtype: torch.dtype, n: int = 1) -> str | None:
        """Why the gradient of n tokens is made before `target`, which `why_not` has no objection to, is updated; or None."""
        if why := self.why_not_some(target):
            return why
        w, m, _ = _matrix(target)
        return adamw_product.why_not(w, m, self._constants, dtype, n)

    def update_product(self, target: "ParameterState | Joint", dy: Tensor, x: Tensor) -> None:
        """All rows, with the gradient dy^T x, where nothing speaks against it; dy [n, rows], x [n, cols]."""
        w, m, v = _matrix(target)
        assert isinstance(m, PackedTensor) and isinstance(v, PackedTensor)
        index, borders = target.index, (adamw_kernel.NEVER, adamw_kernel.NEVER)
        if isinstance(target, Joint):
            borders = target.borders
        numbers = self.numbers, self.counts
        adamw_product.adamw_product(
            dy.contiguous(), x.contiguous(), w, m, v, *numbers, index, 0, self._constants, self.count, borders
        )


Stored = PackedTensor | Tensor


def _matrix(target: ParameterState | Joint) -> tuple[PackedTensor, Stored, Stored]:
    if isinstance(target, Joint):
        return target.w, target.m, target.v
    w, m, v = target.packed, target.m.packed or target.m.data, target.v.packed or target.v.data
    assert w is not None and m is not None and v is not None
    return w, m, v


def _rows(x: "PackedTensor | Tensor | None", start: int, stop: int) -> "PackedTensor | Tensor":
    assert x is not None
    return x.rows(start, stop) if isinstance(x, PackedTensor) else x[start:stop]


def _copy(target: "PackedTensor | Tensor", source: "PackedTensor | Tensor") -> None:
    if isinstance(target, PackedTensor):
        assert isinstance(source, PackedTensor)
        write_rows(target, 0, target.shape[0], source)
    else:
        assert isinstance(source, Tensor)
        target.copy_(source)
