"""`adamw.update_rows` as one kernel a matrix, for the states that it knows; the others stay with plain torch."""

import torch
from torch import Tensor

from fp4lab.nvfp4 import PackedTensor, adamw_kernel, kernels
from fp4lab.nvfp4.packed import BLOCK
from fp4lab.train.adamw import AdamWOptions, ParameterState
from fp4lab.train.noise import mix


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
        if s.mv_device != s.device or w.device != s.device:
            return "its state lies on the host"
        return None

    def set(self, step: int, lr: float) -> None:
        """Writes what this step's launches read. Outside a graph."""
        o = self.options
        numbers = torch.tensor([lr, 1 / (1 - o.beta1**step), 1 / (1 - o.beta2**step), 0.0])
        bits = mix(mix(o.seed) ^ step)
        numbers.view(torch.int32)[3] = bits - (1 << 32) if bits >> 31 else bits
        self.numbers.copy_(numbers)

    def update(self, s: ParameterState, grad: Tensor, first: int) -> None:
        """The rows from `first` on; grad [rows, cols]."""
        stop = first + grad.shape[0]
        assert s.packed is not None
        m, v = (_rows(x.packed if x.packed is not None else x.data, first, stop) for x in (s.m, s.v))
        w = s.packed.rows(first, stop)
        adamw_kernel.adamw(grad.contiguous(), w, m, v, self.numbers, self.counts, s.index, first, self._constants, self.count)


def _rows(x: "PackedTensor | Tensor | None", start: int, stop: int) -> "PackedTensor | Tensor":
    assert x is not None
    return x.rows(start, stop) if isinstance(x, PackedTensor) else x[start:stop]
