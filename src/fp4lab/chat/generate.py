"""Greedy generation over any path, with one preallocated cache per call."""

from typing import Protocol

import torch
from torch import Tensor

from fp4lab.model.layers import KVCache


class Path(Protocol):
    """What generation needs of a model: `Qwen3` and `Bridge` have it."""

    def last_logits(self, ids: Tensor, cache: KVCache | None = None) -> Tensor: ...

    def new_cache(self, batch: int, capacity: int) -> KVCache: ...


@torch.no_grad()
def greedy(path: Path, ids: list[int], max_tokens: int, stops: set[int], device: torch.device | str) -> list[int]:
    """The generated ids, without the stop token. One prefill, then a token at a time."""
    cache = path.new_cache(1, len(ids) + max_tokens)
    logits = path.last_logits(torch.tensor([ids], device=device), cache)
    out: list[int] = []
    while len(out) < max_tokens:
        token = int(logits.argmax(-1))
        if token in stops:
            break
        out.append(token)
        if len(out) < max_tokens:
            logits = path.last_logits(torch.tensor([[token]], device=device), cache)
    return out
