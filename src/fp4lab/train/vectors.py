"""All fp32-kept vectors of a model (norms) as one: a hundred and more small parameters, updated by a dozen launches."""

import torch
from torch import Tensor

from fp4lab.train.adamw import AdamWOptions, ParameterState


class Vectors:
    """Moves the master and moments of `states` into flat buffers, of which theirs become views, and updates those.

    The arithmetic is `adamw.update_rows`; lr and bias corrections come from the device (`KernelStep.numbers`).
    """

    def __init__(self, states: list[ParameterState], options: AdamWOptions):
        self.states, self.options = states, options
        self._sizes = [s.cols for s in states]
        self.w, self.m, self.v = (torch.cat([self._part(s, kind).flatten() for s in states]) for kind in "wmv")
        for s, w, m, v in zip(states, *(t.split(self._sizes) for t in (self.w, self.m, self.v)), strict=True):
            s.master, s.m.data, s.v.data = w.view(1, -1), m.view(1, -1), v.view(1, -1)

    @staticmethod
    def takes(s: ParameterState) -> bool:
        """Whether it is an fp32-kept vector on one device."""
        return s.high_precision and s.rows == 1 and s.mv_device == s.device

    @staticmethod
    def _part(s: ParameterState, kind: str) -> Tensor:
        if kind != "w":
            data = (s.m if kind == "m" else s.v).data
            assert data is not None
            return data
        return s.matrix().float() if s.master is None else s.master

    @torch.no_grad()
    def update(self, grads: list[Tensor], numbers: Tensor) -> tuple[Tensor, Tensor]:
        """One gradient a state, in its shape. Returns the sum of the gradients' squares and the largest |update|."""
        o = self.options
        g = torch.cat([x.reshape(-1) for x in grads]).float()
        self.m.lerp_(g, 1 - o.beta1)
        self.v.mul_(o.beta2).addcmul_(g, g, value=1 - o.beta2)
        update = (self.m * numbers[1]) / (self.v * numbers[2]).sqrt_().add_(o.eps)
        if o.max_update is not None:
            update.clamp_(-o.max_update, o.max_update)
        self.w.mul_(1 - numbers[0] * o.weight_decay).sub_(update * numbers[0])
        images = [s.matrix() for s in self.states]
        torch._foreach_copy_(images, [w.view(1, -1) for w in self.w.split(self._sizes)])
        return g.square().sum(), update.abs().amax()
