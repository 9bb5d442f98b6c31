"""Gradients before the step: sanitising, the global norm, clipping."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def sanitize(parameters: Iterable[nn.Parameter]) -> int:
    """NaN and Inf become 0, in place (reference 5.4). Returns how many there were."""
    bad = 0
    for p in parameters:
        if p.grad is not None:
            bad += int((~torch.isfinite(p.grad)).sum())
            torch.nan_to_num_(p.grad, nan=0.0, posinf=0.0, neginf=0.0)
    return bad


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global L2 norm, accumulated in fp32 (each tensor's own in fp32 too)."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scales all gradients so that the global norm is at most `limit`, as torch's clip_grad_norm_ does."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(factor.to(p.grad.device, p.grad.dtype))
