"""Losses of a sample (reference section 5.1), the final norm always applied (reference 0.7: without it 35 to 89)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4lab.model.linears import lookup
from fp4lab.model.qwen3 import Qwen3
from fp4lab.train.batches import IGNORE


def cross_entropy(model, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that count. hidden [B, T, H] after the final norm, targets [B, T] int64, -100 left out.

    Only the positions that count go through the head.
    """
    counts = targets != IGNORE
    return F.cross_entropy(model.logits(hidden[counts]), targets[counts])


def scalar(model: Qwen3, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean |hidden - embedding of the target|, over the targets that count."""
    counts = targets != IGNORE
    wanted = embed(model, targets[counts])
    return (hidden[counts].float() - wanted.detach().float()).abs().mean()


def embed(model, ids: Tensor) -> Tensor:
    """The path's embedding of ids [...], [..., H]."""
    if isinstance(model, Qwen3):
        return model.model.embed_tokens(ids)
    return lookup(model.store.embedding, ids, model.dtype)


LOSSES = {"ce": cross_entropy, "scalar": scalar}


@torch.no_grad()
def evaluate(model, batches, name: str = "ce") -> tuple[float, int]:
    """Mean loss over all targets of the batches, and their number."""
    device = model.rope.inv_freq.device
    total, tokens = 0.0, 0
    for batch in batches:
        targets = batch.targets.to(device)
        count = int((targets != IGNORE).sum())
        if count:
            total += float(LOSSES[name](model, model.hidden(batch.ids.to(device)), targets)) * count
            tokens += count
    return total / max(tokens, 1), tokens
