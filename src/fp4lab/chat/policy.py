"""What generation keeps between tokens and between turns: three KV policies with one interface.

replay      nothing: the whole sequence again for every token
prefill     a cache for each turn: the whole context is encoded when a turn starts
persistent  a cache for the conversation: only what is new is encoded

A policy is path-agnostic: `Qwen3` and `Bridge` are both a `Path`. Its `context` is every token of the conversation so
far; ids, not text, so that all policies continue from exactly what was generated.
"""

from typing import Protocol

import torch
from torch import Tensor

from fp4lab.model.layers import KVCache


class Path(Protocol):
    """What generation needs of a model."""

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def new_cache(self, batch: int, capacity: int) -> KVCache: ...


class Replay:
    """Also the base of the other two: what differs is what `_encode` keeps."""

    def __init__(self, path: Path, device: torch.device | str, token_by_token: bool = False):
        self._path, self._device, self._token_by_token = path, device, token_by_token
        self.context: list[int] = []
        self.cache: KVCache | None = None
        self.most_cached = 0  # tokens in the cache at its fullest in this turn
        self.cache_bytes = 0  # what the cache has reserved

    @property
    def cache_len(self) -> int:
        return self.cache.length if self.cache is not None else 0

    def begin(self, ids: list[int], room: int) -> Tensor:
        """A turn starts: `ids` are what is new since the last one ended, `room` the tokens that may follow it.

        Returns the logits after the last of them, [V] fp32.
        """
        self.most_cached = 0
        self.context += ids
        return self._logits(self._encode(ids, room))

    def accept(self, token: int) -> Tensor:
        """One more token; the logits after it."""
        self.context.append(token)
        return self._logits(self._encode([token], 0))

    def end(self, ids: list[int]) -> None:
        """The turn is over: `ids` close it. No logits are wanted."""
        self.context += ids

    def _encode(self, new: list[int], room: int) -> Tensor:
        """Hidden states [1, T, H] that end with the last token of the context."""
        return self._forward(self.context)

    def _forward(self, ids: list[int]) -> Tensor:
        hidden = self._path.hidden(torch.tensor([ids], device=self._device), self.cache)
        if self.cache is not None:
            self.most_cached, self.cache_bytes = max(self.most_cached, self.cache_len), self.cache.nbytes
        return hidden

    def _fill(self, ids: list[int]) -> Tensor:
        """Into the cache, whole or a token at a time."""
        if not self._token_by_token:
            return self._forward(ids)
        for token in ids:
            hidden = self._forward([token])
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._path.logits(hidden[:, -1])[0]


class Prefill(Replay):
    def _encode(self, new: list[int], room: int) -> Tensor:
        if self.cache is None:
            self.cache = self._path.new_cache(1, len(self.context) + room)
            return self._fill(self.context)
        return self._fill(new)

    def end(self, ids: list[int]) -> None:
        super().end(ids)
        self.cache = None


class Persistent(Replay):
    """`capacity`: tokens that the conversation can reach, 0 if nobody knows; the cache grows when it is passed."""

    def __init__(self, path: Path, device: torch.device | str, token_by_token: bool = False, capacity: int = 0):
        super().__init__(path, device, token_by_token)
        self._capacity = capacity

    def _encode(self, new: list[int], room: int) -> Tensor:
        needed = len(self.context) + room
        if self.cache is None:
            self.cache = self._path.new_cache(1, max(needed, self._capacity))
        elif needed > self.cache.capacity:
            self.cache = self.cache.grown(max(needed, 2 * self.cache.capacity))
        return self._fill(new)

    def end(self, ids: list[int]) -> None:
        """Every token of the turn goes into the cache, those that close it too."""
        super().end(ids)
        self._encode(ids, 0)
        assert self.cache_len == len(self.context), "the cache does not hold the conversation"


POLICIES = {"replay": Replay, "prefill": Prefill, "persistent": Persistent}
