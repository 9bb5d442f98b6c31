"""One training step of task=tune, whatever `step` is: loss, gradients, clipping, update, and the new weights for every path."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fp4lab.errors import Diverged
from fp4lab.events import Emit, Note, StateHealth
from fp4lab.model.paths import ste_linears
from fp4lab.model.qwen3 import Qwen3
from fp4lab.tasks.session import Session
from fp4lab.tasks.step import Optimizer, byte_report, make_optimizer
from fp4lab.train import grads
from fp4lab.train.adamw import ParameterState
from fp4lab.train.batches import IGNORE, Batch
from fp4lab.train.chunked import ChunkedAdamW
from fp4lab.train.fused import FusedAdamW
from fp4lab.train.joined import JoinedAdamW
from fp4lab.train.loss import LOSSES
from fp4lab.train.state import named_parts


@dataclass(frozen=True)
class Done:
    """`loss` is the one before the update; `health` is None where torch's AdamW has none to give."""

    loss: float
    grad_norm: float
    health: StateHealth | None


class Advance:
    """`advance(batch, lr)` takes a step. Raises Diverged when the loss or the gradient's norm is not finite.

    With task.accumulate the rows go through the model in parts whose gradients are summed: the same step in less memory.
    """

    def __init__(self, session: Session, emit: Emit):
        assert isinstance(session.model, Qwen3)
        self.session, self.model, self._steps = session, session.model, 0
        self.clip, self.sanitize = session.config["step"]["clip_grad"], session.config["step"]["sanitize"]
        self.parts, self.emit = session.config["task"]["accumulate"], emit
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        dense = session.config["step"]["name"] == "dense"
        self.optimizer: Optimizer | torch.optim.AdamW = _torch_adamw(session) if dense else make_optimizer(session, emit)
        session.store.dense = None  # the masters took over; a copy of the start would only be stale
        if not isinstance(self.optimizer, torch.optim.AdamW):
            for row in byte_report(session, self.optimizer):
                emit(row)

    def __call__(self, batch: Batch, lr: float) -> Done:
        optimizer, step = self.optimizer, self._steps
        self._steps += 1
        if isinstance(optimizer, FusedAdamW):
            optimizer.begin(lr)
        parts = batch.parts(self.parts)
        counts = [int((part.targets != IGNORE).sum()) for part in parts]
        value = sum(self._backward(part, count / sum(counts), step) for part, count in zip(parts, counts, strict=True))
        if isinstance(optimizer, FusedAdamW):
            health, norm = optimizer.finish()
            self._finite(norm, step)
            self.session.publish(optimizer.stored())
            return Done(value, float(norm), health)
        if self.sanitize and (bad := grads.sanitize(self.parameters)):
            self.emit(Note(topic="gradients", text=f"step {step}: {bad} non-finite gradients were set to 0"))
        norm = grads.grad_norm(self.parameters)
        self._finite(norm, step)
        if self.clip:
            grads.clip(self.parameters, norm, self.clip)
        if isinstance(optimizer, ChunkedAdamW | JoinedAdamW):
            health = optimizer.step(lr)
            stored = optimizer.stored()
            moved = self.session.publish(stored, count=not stored)
            health.code_changed = health.code_changed if stored else moved
            return Done(value, float(norm), health)
        assert isinstance(optimizer, torch.optim.AdamW)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.session.publish()
        return Done(value, float(norm), None)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(kind, tensor) of all that the optimizer keeps, always in the same order."""
        if not isinstance(self.optimizer, torch.optim.AdamW):
            yield from self.optimizer.tensors()
            for codes in (s.codes for s in _states(self.optimizer) if s.codes is not None):
                yield from ((f"codes_{part}", t) for part, t in named_parts(codes))
            return
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            yield from self.optimizer.state[p].items()

    def make_state(self) -> None:
        """torch's AdamW makes its state in its first step: here without one."""
        if isinstance(self.optimizer, torch.optim.AdamW):
            for p in (p for group in self.optimizer.param_groups for p in group["params"]):
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    def restore(self, steps: int) -> None:
        """Goes on from here: the state that `state` names has been written."""
        self._steps = steps
        if isinstance(self.optimizer, ChunkedAdamW | JoinedAdamW | FusedAdamW):
            self.optimizer.t = steps
        for _, linear in ste_linears(self.model):
            linear.clear_eval_cache()

    def _backward(self, batch: Batch, share: float, step: int) -> float:
        """Adds the gradients of `share` times the mean loss of a part; returns that."""
        device, optimizer = self.session.device, self.optimizer
        segments = None if batch.segments is None else batch.segments.to(device)
        hidden, targets = self.model.hidden(batch.ids.to(device), segments=segments), batch.targets.to(device)
        if isinstance(optimizer, FusedAdamW):
            loss = optimizer.loss(hidden, targets)
        else:
            loss = LOSSES[self.session.config["loss"]](self.model, hidden, targets)
        loss = loss * share
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} at step {step}")
        loss.backward()
        return value

    def _finite(self, norm: torch.Tensor, step: int) -> None:
        if not math.isfinite(norm):
            raise Diverged(f"the gradient's norm is {float(norm)} at step {step}, and the loss was finite")


def _states(optimizer: Optimizer) -> list[ParameterState]:
    if isinstance(optimizer, JoinedAdamW):
        return [g.state for g in optimizer.groups]
    if isinstance(optimizer, FusedAdamW):
        return list(optimizer.states.values())
    return list(optimizer.states) if isinstance(optimizer, ChunkedAdamW) else []


def _torch_adamw(session: Session) -> torch.optim.AdamW:
    """step=dense. Norms are not decayed."""
    c = session.config["step"]
    assert isinstance(session.model, Qwen3)
    parameters = [p for p in session.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": c["weight_decay"]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    fused = session.device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=0.0, betas=(c["beta1"], c["beta2"]), eps=c["eps"], fused=fused)
